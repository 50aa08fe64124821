#!/usr/bin/env bash
# Several processes on this machine's CPU that train together, as on the hosts of a pod.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$here/common.sh"

usage() {
    cat <<'HELP'
launch/local.sh [FLAGS] -- ARGUMENTS OF search-r3

  --processes N     how many processes (2)
  --devices D       devices of each (1)
  --restarts N      how often all start again when the run ends with 75, which passes by itself (5)
  --pause SECONDS   before the first of these starts (10); doubled each time, up to five minutes
  --dry-run         print the commands, run nothing

Every process gets the arguments as they stand, and by the environment its number and where process 0 listens.
SIGTERM and SIGINT are passed on to every process: the first saves and stops, a second ends at once. Status 2, a
mistake, ends all of them. The exit status is that of the process that failed. Secrets (HF_TOKEN) come by the
environment.
HELP
}

# prefixed NUMBER: lines of another process are told apart.
prefixed() {
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        printf '[%s] %s\n' "$1" "$line"
    done
}

# start NUMBER COMMAND…: in the background, in a process group of its own.
start() {
    local number="$1"
    shift
    # A terminal sends Ctrl-C to the whole group of this script; the processes would hear it twice, and leave at once.
    set -m
    if [ "$number" -eq 0 ]; then
        "$@" </dev/null &
        running+=($!)
    else
        mkfifo "$scratch/$number"
        prefixed "$number" <"$scratch/$number" &
        readers+=($!)
        "$@" >"$scratch/$number" 2>&1 </dev/null &
        running+=($!)
    fi
    set +m
}

# shellcheck disable=SC2329
# pass_on SIGNAL: to every process that is left.
pass_on() {
    asked=1
    kill "-$1" ${running[@]+"${running[@]}"} 2>/dev/null || true
    # In the background it does not hear of Ctrl-C.
    [ -z "$sleeping" ] || kill "$sleeping" 2>/dev/null || true
}

# wait_for_all: sets `failed` to the status of the process that failed, if one did.
wait_for_all() {
    local left process status
    while [ ${#running[@]} -gt 0 ]; do
        left=()
        for process in "${running[@]}"; do
            if kill -0 "$process" 2>/dev/null; then
                left+=("$process")
                continue
            fi
            status=0
            wait "$process" || status=$?
            # 75 says only that another one has failed, and may be seen before it.
            if [ "$failed" -eq 0 ] || { [ "$failed" -eq 75 ] && [ "$status" -ne 0 ]; }; then
                failed=$status
            fi
        done
        running=(${left[@]+"${left[@]}"})
        if [ "$failed" -eq 2 ] && [ -z "$ended" ] && [ ${#running[@]} -gt 0 ]; then
            # They may wait for the one with the mistake.
            ended=1
            kill -TERM "${running[@]}" 2>/dev/null || true
        fi
        # Ctrl-C ends it as well.
        sleep 0.1 || true
    done
}

# run_once ARGUMENT…: all processes from start to end; sets `failed`.
run_once() {
    local port number command environment
    port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
    environment=(
        "SEARCH_R3_COORDINATOR=localhost:$port"
        "SEARCH_R3_PROCESSES=$processes"
        JAX_PLATFORMS=cpu
        "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    )
    # Each device's part of a collective waits in a thread of its own.
    [ "$devices" -eq 1 ] || environment+=("NPROC=$((2 * devices))")
    running=() readers=() failed=0 ended=''
    for ((number = 0; number < processes; number++)); do
        command=(env "${environment[@]}" "SEARCH_R3_PROCESS=$number" search-r3 "$@")
        if [ -n "$dry_run" ]; then
            act "${command[@]}"
        elif [ -z "$asked" ]; then
            start "$number" "${command[@]}"
        fi
    done
    wait_for_all
    for ((number = 1; number <= ${#readers[@]}; number++)); do
        # A process that was ended before it wrote has left its reader waiting for a first writer.
        : <>"$scratch/$number"
        wait "${readers[number - 1]}" || true
        rm "$scratch/$number"
    done
}

# rest SECONDS: a signal ends it.
rest() {
    sleep "$1" >/dev/null 2>&1 3>&- &
    sleeping=$!
    # Heard before there was anything to end.
    [ -z "$asked" ] || kill "$sleeping" 2>/dev/null || true
    wait "$sleeping" || true
    sleeping=''
}

processes=2 devices=1 restarts=5 pause=10 dry_run=
while [ $# -gt 0 ]; do
    case "$1" in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --processes | --devices | --restarts | --pause)
        value="$(value_of "$@")"
        printf -v "${1#--}" '%s' "$value"
        shift 2
        ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) fail "$1: unknown; --help shows what there is" ;;
    esac
done
[ "${1:-}" = -- ] && [ $# -ge 2 ] || fail "what shall run is missing; it comes after --"
shift
check_arguments "$@"
for flag in processes devices restarts pause; do
    check_count "--$flag" "${!flag}"
done
[ "$processes" -ge 1 ] && [ "$devices" -ge 1 ] || fail "--processes, --devices: at least 1"
check_search_r3 "$@"
if ! command -v search-r3 >/dev/null && [ -x "$here/../.venv/bin/search-r3" ]; then
    PATH="$here/../.venv/bin:$PATH"
fi
need python3 "install Python 3.11 or later"
[ -n "$dry_run" ] || need search-r3 "pip install -e . makes it"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
running=() asked='' sleeping='' failed=0
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
for ((try = 1; ; try++)); do
    run_once "$@"
    if [ "$failed" -ne 75 ] || [ -n "$asked" ] || [ "$try" -gt "$restarts" ]; then
        break
    fi
    seconds="$(pause_before "$pause" "$try")"
    echo "local.sh: status 75, which passes by itself; all start again in $seconds s ($try of $restarts)" >&2
    rest "$seconds"
    [ -z "$asked" ] || break
done
if [ "$failed" -eq 2 ]; then
    echo "local.sh: status 2: what it says above is to be mended, and is not tried again" >&2
fi
exit "$failed"
