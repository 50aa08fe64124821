#!/usr/bin/env bash
# A slice of a TPU pod on Cloud TPU VMs: asked for, installed, trained on, and asked for again when it has been taken away.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$here/common.sh"

usage() {
    cat <<'HELP'
launch/tpu_vm.sh ACTION [FLAGS] [-- ARGUMENTS OF search-r3]

  create    ask for a slice, as a queued resource
  wait      until it is there
  install   the package on every worker
  run       start search-r3 on every worker; it goes on without this machine
  logs      what a worker has written
  status    of the slice, and of search-r3 on every worker
  stop      search-r3 saves and ends, on every worker
  delete    give the slice back; its disks are gone
  up        create, wait, install, run, and follow to the end. A slice that was taken away is asked for again, a run of which a process has
            died is started again; either goes on from the last checkpoint. Ctrl-C leaves the run alone, and the same command takes it up

  --name NAME         of the slice (search-r3)
  --project, --zone   what gcloud is set to
  --type TYPE         accelerator type (v5litepod-16)
  --runtime VERSION   software of its machines; by the type: v2-alpha-tpuv6e, v2-alpha-tpuv5, v2-alpha-tpuv5-lite or tpu-ubuntu2204-base
  --spot              may be taken away at any time
  --source FOLDER     sources to install (this checkout)
  --repo URL          the same, cloned by each worker
  --nfs HOST:/SHARE   mounted on every worker as /mnt/search-r3. --run belongs there: all write to it, and it outlives the slice
  --env-file FILE     NAME=VALUE a line, for search-r3 (HF_TOKEN); copied to the workers, never part of a command
  --worker N          whose log (0); --follow: as it grows
  --poll SECONDS      between two looks (30)
  --restarts N        how often a run is started again within half an hour, and a slice asked for that never comes (5)
  --dry-run           print the commands, run nothing
HELP
}

say() {
    [ -n "$dry_run" ] || printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$name" "$*" >&3
}

tpus() {
    act gcloud compute tpus "$@" ${place[@]+"${place[@]}"} --quiet
}

# on_workers WHICH WORD…: a command of tpu_worker.sh on these workers.
on_workers() {
    local which="$1"
    shift
    tpus tpu-vm ssh "$name" "--worker=$which" "--command=bash search_r3_jax/launch/tpu_worker.sh $(quoted "$@")"
}

create() {
    # Not waited for here: it may take days, which gcloud would not.
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot} --async
    dry_state=ACTIVE
}

delete() {
    tpus queued-resources delete "$name" --force
}

# slice_state: ACTIVE and so on; NONE where there is no such slice, UNKNOWN where nobody can tell.
slice_state() {
    local found
    if found="$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>"$scratch/error")"; then
        if [ -n "$dry_run" ]; then
            found="$dry_state"
        elif [ "$found" = ACTIVE ] && [ "${1:-}" = thoroughly ]; then
            # The machines of an active slice may be gone.
            case "$(tpus tpu-vm describe "$name" '--format=value(state)' 2>/dev/null || true)" in
            PREEMPTED | TERMINATED) found=FAILED ;;
            esac
        fi
        printf '%s' "${found:-UNKNOWN}"
    elif grep -qi 'not.found' "$scratch/error"; then
        printf NONE
    else
        tail -n 1 "$scratch/error" >&2
        printf UNKNOWN
    fi
}

GONE=20 AGAIN=21
# wait_for_slice: 0 once it is there, GONE where it will not come.
wait_for_slice() {
    local state before='' unknown=0
    while :; do
        state="$(slice_state)"
        case "$state" in
        ACTIVE) return ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING)
            say "$state"
            return "$GONE"
            ;;
        # Just asked for it may not be listed yet.
        NONE | UNKNOWN)
            unknown=$((unknown + 1))
            [ "$unknown" -lt 10 ] || return 1
            ;;
        *) unknown=0 ;;
        esac
        [ "$state" = "$before" ] || say "$state"
        before="$state"
        sleep "$poll"
    done
}

install() {
    local unpack
    if [ -n "$repo" ]; then
        unpack="if [ -d search_r3_jax ]; then git -C search_r3_jax pull --quiet; else git clone --quiet $(quoted "$repo") search_r3_jax; fi"
    else
        act tar -czf "$scratch/sources.tar.gz" -C "$source" --exclude=.git --exclude=.venv --exclude=./runs --exclude='*.env' . || return
        tpus tpu-vm scp "$scratch/sources.tar.gz" "$name:search_r3_jax.tar.gz" --worker=all || return
        unpack="mkdir -p search_r3_jax && tar -xzf search_r3_jax.tar.gz -C search_r3_jax"
    fi
    tpus tpu-vm ssh "$name" --worker=all "--command=$unpack" || return
    [ -z "$env_file" ] || tpus tpu-vm scp "$env_file" "$name:.search_r3.env" --worker=all || return
    on_workers all install ${nfs:+"$nfs"}
}

RUNNING=22
# outcome REPORT: RUNNING, 0 where all have finished, AGAIN where another start may help, else what a worker ended with.
outcome() {
    local workers
    workers="$(grep '^worker ' <<<"$1")" || return "$AGAIN"
    if grep -q ': running$' <<<"$workers"; then
        return "$RUNNING"
    elif grep -q ': ended 2$' <<<"$workers"; then
        # A mistake in the arguments is there the next time, too.
        return 2
    elif grep -Eq ': (ended 75|ended 12[89]|ended 1[3-9].|ended 2..|lost|stopped|idle)$' <<<"$workers"; then
        # 75: another process has died; 128 and more, and lost: the one that did; stopped: by the machine, not by us.
        return "$AGAIN"
    fi
    workers="$(sed -n 's/.*: ended //p' <<<"$workers" | head -n 1)"
    return "${workers:-0}"
}

# follow: the log of worker 0 as it grows, until all have ended; what `outcome` says, or GONE.
follow() {
    local from=0 lines report answered state status
    while :; do
        [ -n "$dry_run" ] || sleep "$poll"
        if lines="$(on_workers 0 log "$from" 2>/dev/null)" && [ -n "$lines" ]; then
            from="${lines%%$'\n'*}"
            [ "$from" = "$lines" ] || printf '%s\n' "${lines#*$'\n'}"
        fi
        answered=1
        report="$(on_workers all status 2>/dev/null)" || answered=''
        [ -z "$dry_run" ] || return 0
        status=0
        outcome "$report" || status=$?
        [ "$status" -ne "$RUNNING" ] || continue
        if [ -z "$answered" ] || [ "$status" -eq "$AGAIN" ]; then
            state="$(slice_state thoroughly)"
            case "$state" in
            ACTIVE | UNKNOWN) ;;
            *)
                say "$state"
                return "$GONE"
                ;;
            esac
        fi
        if [ -n "$answered" ]; then
            printf '%s\n' "$report"
            return "$status"
        fi
        say "not every worker answers"
    done
}

run() {
    on_workers all start "$@"
}

# install_and_run ARGUMENT…: in a few tries, as ssh may not answer at once; a run that is under way keeps the sources it has.
install_and_run() {
    local try status=0
    outcome "$(on_workers all status 2>/dev/null)" || status=$?
    if [ "$status" -eq "$RUNNING" ]; then
        run "$@"
        return
    fi
    for try in 1 2 3; do
        if install && run "$@"; then
            return
        fi
        say "try $try failed"
        sleep "$poll"
    done
    return 1
}

up() {
    local left="$restarts" vain=0 state status started
    while :; do
        state="$(slice_state thoroughly)"
        case "$state" in
        NONE)
            say "asking for $type"
            create || return
            ;;
        FAILED | SUSPENDED)
            say "$state: giving it back"
            delete || return
            continue
            ;;
        SUSPENDING | DELETING)
            sleep "$poll"
            continue
            ;;
        esac
        status=0
        wait_for_slice || status=$?
        if [ "$status" -eq "$GONE" ]; then
            vain=$((vain + 1))
            [ "$vain" -le "$restarts" ] || return 1
            sleep "$poll"
            continue
        fi
        [ "$status" -eq 0 ] || return "$status"
        vain=0 started=$SECONDS
        if install_and_run "$@"; then
            follow || status=$?
        elif [ "$(slice_state thoroughly)" = ACTIVE ]; then
            return 1
        else
            status="$GONE"
        fi
        case "$status" in
        "$GONE") left="$restarts" ;;
        "$AGAIN")
            [ $((SECONDS - started)) -lt 1800 ] || left="$restarts"
            [ "$left" -gt 0 ] || return 75
            left=$((left - 1))
            say "starting again on all workers"
            ;;
        *) return "$status" ;;
        esac
    done
}

action="${1:-}"
case "$action" in
create | wait | install | run | logs | status | stop | delete | up) shift ;;
--help) usage && exit ;;
*) fail "${action:-nothing to do}: one of create, wait, install, run, logs, status, stop, delete, up; --help shows more" ;;
esac
name=search-r3 project='' zone='' type=v5litepod-16 runtime='' spot='' source="$(dirname "$here")" repo='' nfs='' env_file=''
worker=0 grow='' poll=30 restarts=5 dry_run=''
check_arguments "$@"
while [ $# -gt 0 ]; do
    case "$1" in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --name | --project | --zone | --type | --runtime | --source | --repo | --nfs | --worker | --poll | --restarts | --env-file)
        value="$(value_of "$@")"
        case "$1" in
        --env-file) env_file="$value" ;;
        *) printf -v "${1#--}" '%s' "$value" ;;
        esac
        shift 2
        ;;
    --spot) spot=1 && shift ;;
    --follow) grow=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) fail "$1: unknown; --help shows what there is" ;;
    esac
done
if [ "${1:-}" = -- ]; then shift; fi
case "$action" in
run | up) [ $# -gt 0 ] || fail "what shall run is missing; it comes after --" ;;
*) [ $# -eq 0 ] || fail "$1: $action takes nothing after --" ;;
esac

check_name --name "$name"
check_word --type "$type"
for flag in project zone runtime repo nfs; do
    [ -z "${!flag}" ] || check_word "--$flag" "${!flag}"
done
for flag in worker poll restarts; do
    check_count "--$flag" "${!flag}"
done
[ -z "$env_file" ] || [ -r "$env_file" ] || fail "--env-file: $env_file cannot be read"
[ $# -eq 0 ] || check_search_r3 "$@"
[ -n "$repo" ] || [ -f "$source/launch/tpu_worker.sh" ] || fail "--source: $source is no checkout of search_r3_jax"
# A whole path: scp takes what is before a colon for a machine.
[ -z "$env_file" ] || env_file="$(cd "$(dirname "$env_file")" && pwd)/$(basename "$env_file")"
if [ -z "$runtime" ]; then
    case "$type" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--type: $type: its --runtime is not known here; give it" ;;
    esac
fi
[ -n "$dry_run" ] || need gcloud "https://cloud.google.com/sdk/docs/install"

place=(${project:+"--project=$project"} ${zone:+"--zone=$zone"})
dry_state=ACTIVE
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
case "$action" in
create) create ;;
wait) wait_for_slice || exit 1 ;;
install) install ;;
run) run "$@" ;;
logs) tpus tpu-vm ssh "$name" "--worker=$worker" "--command=tail -n +1 ${grow:+-F }search_r3_run/log.txt" ;;
status)
    say "$(slice_state)"
    on_workers all status
    ;;
stop) on_workers all stop ;;
delete) delete ;;
up)
    dry_state=NONE
    up "$@"
    ;;
esac
