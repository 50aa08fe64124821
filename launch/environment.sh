# shellcheck shell=bash
# Sourced by the other scripts: makes and enters .venv, unless a virtual environment is active already.

# enter_environment: .venv in the checkout, made where it is missing.
enter_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        return
    fi
    local folder=".venv"
    if [ ! -x "$folder/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$folder"
    fi
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
}

# install STAMP REQUIREMENT…: pip install, skipped when the same was installed from the same files before.
install() {
    local stamp="$VIRTUAL_ENV/.installed-$1" state
    shift
    state="$* $(cat setup.cfg requirements.txt pyproject.toml | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    echo "installing $* (once; takes a minute or two)"
    python -m pip install -qq --upgrade "pip>=25"
    python -m pip install -qq --constraint requirements.txt "$@"
    printf '%s' "$state" >"$stamp"
}
