#!/usr/bin/env bash
# What tpu_vm.sh does on each worker, where it copies these sources to.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$here/common.sh"
dry_run=
root="$(dirname "$here")"
state="$HOME/search_r3_run"
secrets="$HOME/.search_r3.env"
shared=/mnt/search-r3

# install [HOST:/SHARE]: the package in an environment of its own, and the shared folder.
install_here() {
    if [ -n "${1:-}" ] && ! mountpoint -q "$shared"; then
        command -v mount.nfs >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; }
        sudo mkdir -p "$shared"
        sudo mount -t nfs "$1" "$shared"
        sudo chmod a+rwx "$shared"
    fi
    [ ! -e "$secrets" ] || chmod 600 "$secrets"
    cd "$root"
    # The current line of JAX needs 3.12, and the images' own Python may be older.
    PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -qq --user uv
    uv python install --quiet 3.12
    PYTHON="$(uv python find 3.12)"
    # shellcheck source=launch/environment.sh
    . launch/environment.sh
    enter_environment
    install tpu --editable '.[tpu]'
}

# held: whether something of a run is alive. Locks go with their processes, whichever way these end.
held() {
    ! (flock --nonblock 9) 9>>"$state/lock"
}

# start ARGUMENT…: search-r3, detached; a second call with the same arguments changes nothing.
start() {
    local wanted
    wanted="$(quoted "$@")"
    mkdir -p "$state"
    exec 9>"$state/lock"
    # Whoever asks whether it is held has it for a moment.
    if ! flock --timeout 1 9; then
        [ "$(cat "$state/command")" = "$wanted" ] || fail "search-r3 runs here already, with other arguments; \`stop\` ends it"
        echo "runs already"
        return
    fi
    # Of the attempt before.
    rm -f "$state/ended" "$state/process"
    printf '%s' "$wanted" >"$state/command"
    # A session of its own, which a lost connection does not end.
    setsid bash "$0" attempt "$@" >>"$state/log.txt" 2>&1 </dev/null 3>&- &
    echo started
}

# metadata NAME: what the machine is told about its slice.
metadata() {
    curl --fail --silent --show-error --retry 5 --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# line_of NAME DEFAULT: of the slice's description in `tpu_env`, whose lines are NAME: 'value'.
line_of() {
    local value
    value="$(sed -n "s/^ *$1: *'\(.*\)' *\$/\1/p" <<<"$tpu_env")"
    printf '%s' "${value:-$2}"
}

# as_indexer ARGUMENT…: into `arguments`: this worker's share of the work, on its own chips.
as_indexer() {
    local tpu_env endpoints hosts number
    tpu_env="$(metadata tpu-env)"
    endpoints="$(metadata worker-network-endpoints)"
    endpoints="${endpoints//[^,]/}"
    hosts=$((${#endpoints} + 1))
    number=$(($(line_of MEGASCALE_SLICE_ID 0) * hosts + $(metadata agent-worker-number)))
    arguments=("$@" --process "$number" --processes $((hosts * $(line_of MEGASCALE_NUM_SLICES 1))))
    a_world_of_its_own "$(line_of CHIPS_PER_HOST_BOUNDS 2,2,1)"
}

# attempt ARGUMENT…: within that session: one run, and how it ended.
attempt() {
    local before status=0 ended arguments=("$@")
    before="$(wc -l <"$state/log.txt")"
    [ ! -e "$secrets" ] || read_environment "$secrets"
    PATH="$root/.venv/bin:$PATH"
    cd "$HOME"
    if [ "$1" = indexer ]; then
        as_indexer "$@"
        {
            wait_for_run "$(value_in --run "$@")"
            exec search-r3 "${arguments[@]}"
        } &
    else
        search-r3 "${arguments[@]}" &
    fi
    printf '%s' "$!" >"$state/process.new"
    mv "$state/process.new" "$state/process"
    wait "$!" || status=$?
    ended="ended $status"
    if [ "$status" -eq 0 ]; then
        ended=finished
        # A run that stopped ends with 0 as a finished one does; only its last line tells them apart.
        ! tail -n "+$((before + 1))" "$state/log.txt" | grep -q ': stopped and saved at step ' || ended=stopped
    fi
    printf '%s' "$ended" >"$state/ended.new"
    mv "$state/ended.new" "$state/ended"
}

# status: one word or two, after this worker's name.
status() {
    local now=idle
    if [ -e "$state/command" ]; then
        now=lost
        if held; then
            now=running
        elif [ -e "$state/ended" ]; then
            now="$(cat "$state/ended")"
        fi
    fi
    printf 'worker %s: %s\n' "$(hostname)" "$now"
}

# log FROM: the number of the line to ask for next, then the whole lines from there; 0 is the last few.
log() {
    local from="$1" count=0
    [ ! -e "$state/log.txt" ] || count="$(wc -l <"$state/log.txt")"
    [ "$from" -gt 0 ] || from=$((count > 20 ? count - 19 : 1))
    echo $((count + 1))
    [ "$from" -gt "$count" ] || sed -n "${from},${count}p" "$state/log.txt"
}

# stop: saved, and ended.
stop() {
    # A run that has just been started has no process yet.
    while held && [ ! -e "$state/process" ]; do
        sleep 0.1
    done
    held || fail "nothing runs here"
    kill -TERM "$(cat "$state/process")"
}

action="${1:-}"
shift || true
case "$action" in
install) install_here "$@" ;;
start) start "$@" ;;
attempt) attempt "$@" ;;
status) status ;;
log) log "$1" ;;
follow) exec tail -n +1 -F "$state/log.txt" ;;
stop) stop ;;
*) fail "$action: unknown" ;;
esac
