#!/usr/bin/env bash
# What a container of GKE runs: search-r3 with these arguments, ended so that the cluster knows whether to start again.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$folder/../common.sh"

usage() {
    cat <<'HELP'
launch/gke/entry.sh ARGUMENTS OF search-r3

Runs search-r3 and shows what it writes. SIGTERM is passed on. It ends with search-r3's status, but with 75 where that was
asked to stop and has saved, which is not finished. By the environment:

  SEARCH_R3_PAUSE     seconds to wait before it ends with 75 (0), doubled with each attempt, up to five minutes; once a
                      run has lasted half an hour, the first pause again
  SEARCH_R3_ATTEMPT   how often the cluster has started it again (0)
  SEARCH_R3_BOUNDS    chips of this host, 2,2,1 say, which an indexer takes for all there are
HELP
}

# shellcheck disable=SC2329
# stop: search-r3 saves and ends; a pause is over.
stop() {
    asked=1 heard=1
    [ -z "$waited" ] || { passed=1 && kill -TERM "$waited" 2>/dev/null; } || true
}

# wait_for PROCESS: sets `status`; a signal ends the waiting, and is passed on.
wait_for() {
    passed=''
    waited="$1"
    # Heard before there was anything to pass it on to; twice would be too much, as search-r3 then leaves at once.
    [ -z "$asked" ] || [ -n "$passed" ] || kill -TERM "$waited" 2>/dev/null || true
    while :; do
        heard='' status=0
        wait "$waited" || status=$?
        [ -n "$heard" ] || return 0
    done
}

if [ $# -eq 0 ] || [ "$1" = --help ]; then
    usage
    exit
fi
pause="${SEARCH_R3_PAUSE:-0}" attempt="${SEARCH_R3_ATTEMPT:-0}" asked='' heard='' waited='' status=0
check_count SEARCH_R3_PAUSE "$pause"
check_count SEARCH_R3_ATTEMPT "${attempt:-0}"
output="$(mktemp)"
trap 'rm -f "$output"' EXIT
started=$SECONDS
trap stop TERM INT
if [ "$1" = indexer ] && [ -n "${SEARCH_R3_BOUNDS:-}" ]; then
    a_world_of_its_own "$SEARCH_R3_BOUNDS"
fi
{
    # Before the trainer has made it, there is nothing to follow.
    [ "$1" != indexer ] || wait_for_run "$(value_in --run "$@")"
    exec search-r3 "$@" 3>&-
} >>"$output" 2>&1 </dev/null &
running=$!
tail -n +1 -f --pid="$running" "$output" 3>&- &
shown=$!
wait_for "$running"
ended="$status"
waited=''
wait "$shown" || true
if [ "$ended" -eq 0 ] && grep -q ': stopped and saved at step ' "$output"; then
    ended=75
fi
if [ "$ended" -eq 75 ] && [ -z "$asked" ] && [ "$pause" -gt 0 ]; then
    # A process with another status is seen first: a mistake ends all of them.
    [ $((SECONDS - started)) -lt 1800 ] || attempt=0
    seconds="$(pause_before "$pause" $((attempt + 1)))"
    echo "entry.sh: status 75, which passes by itself; it starts again in $seconds s"
    sleep "$seconds" >/dev/null 2>&1 3>&- &
    wait_for "$!"
elif [ "$ended" -eq 2 ]; then
    echo "entry.sh: status 2: what it says above is to be mended, and is not tried again"
fi
exit "$ended"
