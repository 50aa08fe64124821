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
  up        create, wait, install, run, and follow to the end. A slice that was taken away is asked for again. A run
            that ends with 75 or of which a process has died is started again, after a pause; either goes on from
            the last checkpoint. Status 2, a mistake, ends it. Ctrl-C leaves the run alone, and the same command
            takes it up

What runs is a stage of training over all workers, or `indexer --run DIR`: then each worker indexes with its own
chips, and takes its share of the corpus.

  --name NAME             of the slice (search-r3)
  --project, --zone       what gcloud is set to
  --type TYPE             accelerator type (v5litepod-16)
  --slices N              as many slices, joined by the data-centre network (1); training gets --mesh.slice N
  --runtime VERSION       software of its machines; by the type: v2-alpha-tpuv6e, v2-alpha-tpuv5,
                          v2-alpha-tpuv5-lite or tpu-ubuntu2204-base
  --spot                  may be taken away at any time
  --reserved              from a reservation of the project
  --network NAME          of its machines, and --subnetwork NAME (default)
  --internal-ips          no external addresses; with --tunnel-through-iap or --internal-ip. What the workers install
                          then comes by way of a NAT of the network
  --tunnel-through-iap    ssh by way of Identity-Aware Proxy
  --internal-ip           ssh to internal addresses: this machine is in the network
  --service-account MAIL  what its machines may do
  --boot-disk KEY=VALUE   settings of the boot disk, as gcloud takes them
  --create-option OPTION  any other option of gcloud's create, as often as needed: --create-option=--tags=tpu
  --source FOLDER         sources to install (this checkout)
  --repo URL              the same, cloned by each worker
  --nfs HOST:/SHARE       mounted on every worker as /mnt/search-r3. --run belongs there: all write to it, and it
                          outlives the slice
  --env-file FILE         NAME=VALUE a line, for search-r3 (HF_TOKEN); copied to the workers, never part of a command
  --worker N, --slice M   whose log (0 of 0); --follow: as it grows
  --poll SECONDS          between two looks (30)
  --restarts N            how often a run is started again within half an hour, and a slice asked for that never
                          comes (5)
  --pause SECONDS         before the first of these starts (10); doubled each time, up to five minutes
  --dry-run               print the commands, run nothing
HELP
}

say() {
    [ -n "$dry_run" ] || printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$name" "$*" >&3
}

tpus() {
    act gcloud compute tpus "$@" ${place[@]+"${place[@]}"} --quiet
}

# on_workers WHICH WORD…: a command of tpu_worker.sh on all workers, or on the first.
on_workers() {
    local which="$1"
    shift
    tpus queued-resources ssh "$name" "--node=$which" "--worker=$which" ${reach:+"$reach"} \
        "--command=bash search_r3_jax/launch/tpu_worker.sh $(quoted "$@")"
}

# copy FILE NAME: to all workers.
copy() {
    tpus queued-resources scp "$1" "$name:$2" --node=all --worker=all ${reach:+"$reach"}
}

create() {
    local nodes=("--node-id=$name")
    [ "$slices" -eq 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
    # Not waited for here: it may take days, which gcloud would not.
    tpus queued-resources create "$name" "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" \
        ${network:+"--network=$network"} ${subnetwork:+"--subnetwork=$subnetwork"} ${internal_ips:+--internal-ips} \
        ${service_account:+"--service-account=$service_account"} ${boot_disk:+"--boot-disk=$boot_disk"} \
        ${reserved:+--reserved} ${spot:+--spot} ${create_options[@]+"${create_options[@]}"} --async
    dry_state=ACTIVE
}

delete() {
    tpus queued-resources delete "$name" --force
}

# taken_away: the machines of an active slice may be gone.
taken_away() {
    local node
    for ((node = 0; node < slices; node++)); do
        case "$(tpus tpu-vm describe "$(node_name "$node")" '--format=value(state)' 2>/dev/null || true)" in
        PREEMPTED | TERMINATED) return 0 ;;
        esac
    done
    return 1
}

# node_name NUMBER: what one of the slices is called.
node_name() {
    [ "$slices" -eq 1 ] && echo "$name" || echo "$name-$1"
}

# slice_state: ACTIVE and so on; NONE where there is no such slice, UNKNOWN where nobody can tell.
slice_state() {
    local found
    if found="$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>"$scratch/error")"; then
        if [ -n "$dry_run" ]; then
            found="$dry_state"
        elif [ "$found" = ACTIVE ] && [ "${1:-}" = thoroughly ] && taken_away; then
            found=FAILED
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
        unpack="if [ -d search_r3_jax ]; then git -C search_r3_jax pull --quiet;"
        unpack+=" else git clone --quiet $(quoted "$repo") search_r3_jax; fi"
    else
        act tar -czf "$scratch/sources.tar.gz" -C "$source" --exclude=.git --exclude=.venv --exclude=./runs \
            --exclude='*.env' . || return
        copy "$scratch/sources.tar.gz" search_r3_jax.tar.gz || return
        unpack="mkdir -p search_r3_jax && tar -xzf search_r3_jax.tar.gz -C search_r3_jax"
    fi
    tpus queued-resources ssh "$name" --node=all --worker=all ${reach:+"$reach"} "--command=$unpack" || return
    [ -z "$env_file" ] || copy "$env_file" .search_r3.env || return
    on_workers all install ${nfs:+"$nfs"}
}

RUNNING=22
# outcome REPORT: RUNNING, 0 where all have finished, AGAIN where another start may help, else what a worker ended with.
outcome() {
    local workers again=': (ended 75|ended 12[89]|ended 1[3-9].|ended 2..|lost|stopped|idle)$'
    workers="$(grep '^worker ' <<<"$1")" || return "$AGAIN"
    if grep -q ': ended 2$' <<<"$workers"; then
        # A mistake in the arguments is there the next time, too.
        return 2
    elif [ -n "$alone" ] && grep -Eq "$again" <<<"$workers"; then
        # Of an indexer the others go on without it.
        return "$AGAIN"
    elif grep -q ': running$' <<<"$workers"; then
        return "$RUNNING"
    elif grep -Eq "$again" <<<"$workers"; then
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

# end_all: what goes on after one worker has met a mistake.
end_all() {
    say "status 2: what it says above is to be mended, and is not tried again; the slice stays until \`delete\`"
    on_workers all stop >/dev/null 2>&1 || true
}

# install_and_run ARGUMENT…: in a few tries, as ssh may not answer at once; a run that is under way keeps the sources
# it has.
install_and_run() {
    local try report
    report="$(on_workers all status 2>/dev/null)" || true
    if grep -q '^worker .*: running$' <<<"$report"; then
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
    local left="$restarts" vain=0 state status started seconds
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
            seconds="$(pause_before "$pause" $((restarts - left)))"
            say "starting again on all workers in $seconds s; $left more times after that"
            sleep "$seconds"
            ;;
        2)
            end_all
            return 2
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
name=search-r3 project='' zone='' type=v5litepod-16 slices=1 runtime='' spot='' reserved='' network='' subnetwork=''
internal_ips='' reach='' service_account='' boot_disk='' create_options=() source="$(dirname "$here")" repo='' nfs=''
env_file='' worker=0 slice=0 grow='' poll=30 restarts=5 pause=10 dry_run='' alone=''
check_arguments "$@"
while [ $# -gt 0 ]; do
    case "$1" in
    --) break ;;
    --create-option=*) create_options+=("${1#*=}") && shift ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --create-option)
        create_options+=("$(value_of "$@")")
        shift 2
        ;;
    --name | --project | --zone | --type | --slices | --runtime | --network | --subnetwork | --service-account | \
        --boot-disk | --source | --repo | --nfs | --env-file | --worker | --slice | --poll | --restarts | --pause)
        value="$(value_of "$@")"
        flag="${1#--}"
        printf -v "${flag//-/_}" '%s' "$value"
        shift 2
        ;;
    --spot) spot=1 && shift ;;
    --reserved) reserved=1 && shift ;;
    --internal-ips) internal_ips=1 && shift ;;
    --tunnel-through-iap | --internal-ip)
        [ "${reach:-"$1"}" = "$1" ] || fail "$1: $reach is given, too; one of them"
        reach="$1" && shift
        ;;
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
for flag in project zone runtime network subnetwork service-account repo nfs; do
    variable="${flag//-/_}"
    [ -z "${!variable}" ] || check_word "--$flag" "${!variable}"
done
for flag in slices worker slice poll restarts pause; do
    check_count "--$flag" "${!flag}"
done
[ "$slices" -ge 1 ] || fail "--slices: at least 1"
[[ -z "$boot_disk" || "$boot_disk" =~ ^[a-z-]+=[^,=]+(,[a-z-]+=[^,=]+)*$ ]] || fail "--boot-disk: '$boot_disk': KEY=VALUE,…"
for option in ${create_options[@]+"${create_options[@]}"}; do
    [[ "$option" =~ ^--[a-z] ]] || fail "--create-option: '$option': an option of gcloud, such as --tags=tpu"
done
[ -z "$spot" ] || [ -z "$reserved" ] || fail "--reserved: --spot is given, too; a slice of a reservation is not a spot one"
[ -z "$internal_ips" ] || [ -n "$reach" ] ||
    fail "--internal-ips: ssh needs a way in; add --tunnel-through-iap, or --internal-ip from within the network"
[ -z "$env_file" ] || [ -r "$env_file" ] || fail "--env-file: $env_file cannot be read"
if [ $# -gt 0 ]; then
    check_search_r3 "$@"
    check_indexer "$@"
    [ "$1" != indexer ] || alone=1
    add_slice_axis "$slices" "$@"
    set -- "${arguments[@]}"
fi
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
logs)
    tpus queued-resources ssh "$name" "--node=$slice" "--worker=$worker" ${reach:+"$reach"} \
        "--command=tail -n +1 ${grow:+-F }search_r3_run/log.txt"
    ;;
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
