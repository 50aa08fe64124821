#!/usr/bin/env bash
#SBATCH --job-name=search-r3
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# A job on the GPUs of a SLURM cluster. Called by hand it submits itself; within the job it runs search-r3 on every node and, when the
# time limit has stopped that, queues itself again. SLURM runs a copy of this file from elsewhere, so the job needs no other.
set -euo pipefail

usage() {
    cat <<'HELP'
launch/slurm.sh [FLAGS] -- ARGUMENTS OF search-r3

  --nodes N           nodes (1)
  --gpus N            GPUs of each node (1)
  --tasks node|gpu    a process for each node, over all of its GPUs (node), or a process for each GPU
  --cpus N            cores of each process (what the cluster gives)
  --time LIMIT        time limit (what the cluster gives); 180 s before it the run saves, stops, and is queued again
  --partition P, --account A
  --sbatch OPTION     any other option of sbatch, as often as needed: --sbatch=--constraint=a100
  --attempts N        how often it is started within one job while a process dies, or it ends with 75 (3)
  --pause SECONDS     before the second of these starts (10); doubled each time, up to five minutes
  --dry-run           print the commands, run nothing

`sbatch OPTIONS launch/slurm.sh -- ARGUMENTS` does the same. The job has the environment it was submitted from: HF_TOKEN comes that way,
and search-r3 has to be on the PATH. The folder of --run lies where every node sees it. `scancel JOB` ends it for good.
HELP
}

fail() {
    printf 'slurm.sh: %s\n' "$*" >&2
    exit 2
}

act() {
    local text
    if [ -n "$dry_run" ]; then
        printf -v text '%q ' "$@"
        printf '%s\n' "${text% }"
    else
        "$@"
    fi
}

need() {
    local tool
    for tool in "$@"; do
        if [ -z "$dry_run" ] && ! command -v "$tool" >/dev/null; then
            fail "$tool: not found; call this where the cluster's commands and search-r3 are"
        fi
    done
}

STOPPED=10
# run_step ARGUMENT…: search-r3 on every node; STOPPED where it was asked to stop and has saved, else what it ended with.
run_step() {
    local step=(srun --kill-on-bad-exit=0) statuses=(0 0)
    # Since 22.05 a step no longer takes this over from its job.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # No shell between srun and search-r3: the signal goes to every process of the step, and would end it.
    step+=(search-r3 "$@")
    if [ -n "$dry_run" ]; then
        act "${step[@]}"
        return
    fi
    # A run that stopped ends with 0 as a finished one does; only its last line tells them apart. Of several processes
    # srun tells the highest status, which hides the 2 of the one with a mistake behind the 75 of the others.
    "${step[@]}" 2>&1 | awk -v stopped="$STOPPED" '
        { print; fflush() }
        /: stopped and saved at step / { status = stopped }
        /^srun: error: .*: Exited with exit code 2$/ { mistake = 1 }
        END { exit mistake ? 2 : status }' || statuses=("${PIPESTATUS[@]}")
    [ "${statuses[0]}" -ne 0 ] && [ "${statuses[1]}" -ne 2 ] || return "${statuses[1]}"
    return "${statuses[0]}"
}

in_job() {
    local attempt status seconds
    need srun scontrol search-r3
    if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
        # Under SLURM JAX takes a process to drive one GPU, unless it is told which.
        JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))"
        export JAX_LOCAL_DEVICE_IDS
    fi
    for ((attempt = 1; ; attempt++)); do
        status=0
        run_step "$@" || status=$?
        # 75: it passes by itself, or another process has died; 128 and more: the one that did, by a signal.
        if [ "$status" -ne 75 ] && [ "$status" -lt 128 ] || [ "$attempt" -ge "$attempts" ]; then
            break
        fi
        seconds="$(pause_before "$pause" "$attempt")"
        if [[ "${SLURM_JOB_END_TIME:-}" =~ ^[0-9]+$ ]] && ((SLURM_JOB_END_TIME - $(date +%s) < seconds + 180)); then
            # The time limit's signal would find nobody: the next job goes on.
            status="$STOPPED"
            break
        fi
        echo "slurm.sh: status $status; all start again in $seconds s"
        sleep "$seconds"
    done
    if [ "$status" -eq "$STOPPED" ]; then
        act scontrol requeue "$SLURM_JOB_ID"
        return
    fi
    [ "$status" -ne 2 ] || echo "slurm.sh: status 2: what it says above is to be mended, and is not tried again"
    return "$status"
}

# pause_before FIRST TRY: seconds until then: FIRST, doubled from try to try, up to five minutes.
# As in common.sh, which is not beside the copy of this script that SLURM runs.
pause_before() {
    local seconds="$1" try
    for ((try = 1; try < $2 && seconds < 300; try++)); do
        seconds=$((2 * seconds))
    done
    echo $((seconds < 300 ? seconds : 300))
}

submit() {
    local here options per_node=1
    here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
    # shellcheck source=launch/common.sh
    . "$here/common.sh"
    check_arguments "$@" ${more[@]+"${more[@]}"} "$time" "$partition" "$account"
    check_count --nodes "$nodes"
    check_count --gpus "$gpus"
    check_count --attempts "$attempts"
    check_count --pause "$pause"
    case "$tasks" in
    node) ;;
    # Not --gpus-per-task: each process has to see all GPUs of its node, and takes the one of its own number.
    gpu) per_node="$gpus" ;;
    *) fail "--tasks: '$tasks': node or gpu" ;;
    esac
    check_search_r3 "$@"
    options=("--nodes=$nodes" "--gpus-per-node=$gpus" "--ntasks-per-node=$per_node")
    [ -z "$cpus" ] || options+=("--cpus-per-task=$cpus")
    [ -z "$time" ] || options+=("--time=$time")
    [ -z "$partition" ] || options+=("--partition=$partition")
    [ -z "$account" ] || options+=("--account=$account")
    [ -n "$dry_run" ] || need sbatch "call this where jobs are submitted"
    act sbatch "${options[@]}" ${more[@]+"${more[@]}"} "$here/slurm.sh" --attempts "$attempts" \
        --pause "$pause" -- "$@"
    if [ -n "$dry_run" ]; then
        echo "# and then, in the job:"
        SLURM_CPUS_PER_TASK="$cpus" run_step "$@"
    fi
}

nodes=1 gpus=1 tasks=node cpus='' time='' partition='' account='' attempts=3 pause=10 dry_run='' more=()
while [ $# -gt 0 ]; do
    case "$1" in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --nodes | --gpus | --tasks | --cpus | --time | --partition | --account | --attempts | --pause | \
        --sbatch)
        [ $# -ge 2 ] || fail "$1: a value is missing"
        if [ "$1" = --sbatch ]; then
            more+=("$2")
        else
            printf -v "${1#--}" '%s' "$2"
        fi
        shift 2
        ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) fail "$1: unknown; --help shows what there is" ;;
    esac
done
[ "${1:-}" = -- ] && [ $# -ge 2 ] || fail "what shall run is missing; it comes after --"
shift
if [ -n "${SLURM_JOB_ID:-}" ]; then
    in_job "$@"
else
    submit "$@"
fi
