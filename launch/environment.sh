# shellcheck shell=bash
# Sourced by the other scripts: makes and enters an environment, and installs the pinned set of its interpreter.

# enter_environment: the active virtual environment, or .venv in the checkout, made where it is missing.
enter_environment() {
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        enter_folder .venv "${PYTHON:-python3}"
    fi
}

# enter_folder FOLDER PYTHON: the virtual environment in a folder, made where it is missing.
enter_folder() {
    if [ ! -x "$1/bin/python" ]; then
        "$2" -m venv "$1"
    fi
    # shellcheck disable=SC1091
    . "$1/bin/activate"
}

# requirements_of PYTHON: the pinned set of an interpreter. JAX has two lines: the current one, and the last for Python 3.11.
requirements_of() {
    if "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        echo requirements.txt
    else
        echo requirements-py311.txt
    fi
}

# other_python: an interpreter of the other line than that of the environment; nothing where there is none. OTHER_PYTHON names one.
other_python() {
    local candidate own versions="${PYENV_ROOT:-$HOME/.pyenv}/versions" names=(python3.11)
    own="$(requirements_of python)"
    if [ "$own" != requirements.txt ]; then names=(python3.12 python3.13); fi
    for candidate in "${OTHER_PYTHON:-}" "${names[@]}" "$versions"/*/bin/python3.1[123]; do
        # A name that is there may start nothing, such as a shim without its version.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
            [ "$(requirements_of "$candidate")" != "$own" ]; then
            echo "$candidate"
            return
        fi
    done
}

# install STAMP REQUIREMENT…: pip install, skipped when the same was installed from the same files before.
install() {
    local stamp="$VIRTUAL_ENV/.installed-$1" pinned state
    shift
    pinned="$(requirements_of python)"
    state="$* $(cat setup.cfg "$pinned" pyproject.toml | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    echo "installing $* (once; takes a minute or two)"
    python -m pip install -qq --upgrade "pip>=25"
    python -m pip install -qq --constraint "$pinned" "$@"
    printf '%s' "$state" >"$stamp"
}
