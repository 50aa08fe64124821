#!/usr/bin/env bash
# Trains on a TPU node pool of GKE: a JobSet for the trainer and, for stage 2, a Job for its indexer.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$folder/../common.sh"

usage() {
    cat <<'HELP'
launch/gke/submit.sh FLAGS -- ARGUMENTS OF search-r3

  --name NAME            of the JobSet (search-r3); the indexer's is NAME-indexer
  --image IMAGE          an image that has search-r3, with the extra tpu, and bash
  --claim NAME           a volume claim that many may write to (Filestore): the folder of --run lies in it
  --bucket NAME          a bucket, mounted, in its place; it knows no locks, so nothing keeps two trainers off one run
  --mount PATH           where either is mounted (/mnt/search-r3)
  --accelerator A        label of the node pool (tpu-v5-lite-podslice; tpu-v5p-slice, tpu-v6e-slice …)
  --topology T           the other label (4x4): chips of the slice
  --chips N              chips of a host (4)
  --spot                 on spot nodes
  --indexers N           processes of the indexer (0: none)
  --indexer-topology T   chips of each (2x2), all on one host
  --secret NAME          a secret of the cluster, as environment (HF_TOKEN): kubectl create secret generic NAME --from-env-file=FILE
  --account NAME         service account (default)
  --namespace NAME       (default)
  --restarts N           of the JobSet, each from the last checkpoint (100)
  --grace SECONDS        from SIGTERM to SIGKILL (120)
  --delete               delete both, in place of starting them
  --xpk                  print the command for xpk that starts the trainer, with --cluster NAME and, for what is mounted, --storage NAME;
                         xpk takes a run that was asked to stop for a finished one: submit it again
  --project, --zone      for that command
  --dry-run              print the manifests, start nothing
HELP
}

# chips_of TOPOLOGY: 4x4 is 16.
chips_of() {
    [[ "$1" =~ ^[0-9]{1,3}(x[0-9]{1,3}){1,2}$ ]] || fail "topology: '$1': such as 4x4 or 2x2x4"
    echo $((${1//x/*}))
}

# run_of ARGUMENT…: the run's folder.
run_of() {
    local word before=''
    for word in "$@"; do
        case "$before $word" in
        "--run "*) printf '%s' "$word" ;;
        *" --run="*) printf '%s' "${word#--run=}" ;;
        esac
        before="$word"
    done
}

# manifests ARGUMENT…: what the cluster is asked for.
manifests() {
    local shared=(
        "namespace=$namespace" "account=$account" "image=$image" "accelerator=$accelerator" "spot=${spot:+true}" "secret=$secret"
        "mount=$mount" "claim=$claim" "bucket=$bucket" "fuse=${bucket:+true}"
        # A checkpoint is renamed into place as a folder, which a bucket does file by file, and only up to a number of them.
        "options=implicit-dirs,rename-dir-limit=200000"
    )
    python3 "$folder/fill.py" "$folder/trainer.yaml" "${shared[@]}" "name=$name" "topology=$topology" "chips:=$chips" "hosts:=$hosts" \
        "restarts:=$restarts" "grace:=$grace" -- "$@"
    if [ "$indexers" -gt 0 ]; then
        echo ---
        python3 "$folder/fill.py" "$folder/indexer.yaml" "${shared[@]}" "name=$name-indexer" "topology=$indexer_topology" \
            "chips:=$indexer_chips" "processes:=$indexers" "run=$run" --
    fi
}

# xpk_command ARGUMENT…: the trainer's JobSet by way of xpk.
xpk_command() {
    local type total=$((hosts * chips))
    case "$accelerator" in
    tpu-v5-lite-podslice) type="v5litepod-$total" ;;
    tpu-v6e-slice) type="v6e-$total" ;;
    # These are counted in cores, two a chip.
    tpu-v5p-slice) type="v5p-$((2 * total))" ;;
    tpu-v4-podslice) type="v4-$((2 * total))" ;;
    *) fail "--accelerator: $accelerator: its name in xpk is not known here" ;;
    esac
    # xpk starts again only on the statuses it is told; 2 is a mistake in the arguments.
    quoted xpk workload create "--workload=$name" "--cluster=$cluster" ${project:+"--project=$project"} ${zone:+"--zone=$zone"} \
        "--tpu-type=$type" "--docker-image=$image" ${storage:+"--storage=$storage"} ${spot:+--spot} "--max-restarts=$restarts" \
        --restart-on-exit-codes=1,3-126 "--termination-grace-period-seconds=$grace" "--command=exec $(quoted search-r3 "$@")"
    echo
}

name=search-r3 image='' claim='' bucket='' mount=/mnt/search-r3 accelerator=tpu-v5-lite-podslice topology=4x4 chips=4 spot=''
indexers=0 indexer_topology=2x2 secret='' account=default namespace=default restarts=100 grace=120 cluster='' storage=''
project='' zone='' delete='' xpk='' dry_run=''
check_arguments "$@"
while [ $# -gt 0 ]; do
    case "$1" in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --name | --image | --claim | --bucket | --mount | --accelerator | --topology | --chips | --indexers | --indexer-topology | --secret | \
        --account | --namespace | --restarts | --grace | --cluster | --storage | --project | --zone)
        value="$(value_of "$@")"
        flag="${1#--}"
        printf -v "${flag//-/_}" '%s' "$value"
        shift 2
        ;;
    --spot) spot=1 && shift ;;
    --delete) delete=1 && shift ;;
    --xpk) xpk=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) fail "$1: unknown; --help shows what there is" ;;
    esac
done
if [ "${1:-}" = -- ]; then shift; fi

check_name --name "$name"
check_word --namespace "$namespace"
if [ -n "$delete" ]; then
    [ -n "$dry_run" ] || need kubectl "https://cloud.google.com/sdk/docs/install"
    act kubectl delete "--namespace=$namespace" --ignore-not-found "jobsets.jobset.x-k8s.io/$name" "job.batch/$name-indexer"
    exit
fi
[ $# -gt 0 ] || fail "what shall run is missing; it comes after --"
for flag in image account accelerator; do
    check_word "--$flag" "${!flag}"
done
for flag in claim bucket secret cluster storage project zone; do
    [ -z "${!flag}" ] || check_word "--$flag" "${!flag}"
done
[[ "$mount" =~ ^/[A-Za-z0-9._/-]+$ ]] || fail "--mount: '$mount': a path from /"
for flag in chips indexers restarts grace; do
    check_count "--$flag" "${!flag}"
done
total="$(chips_of "$topology")"
indexer_chips="$(chips_of "$indexer_topology")"
[ "$chips" -gt 0 ] && [ $((total % chips)) -eq 0 ] || fail "--topology: $topology has $total chips, which is no multiple of --chips $chips"
hosts=$((total / chips))
run="$(run_of "$@")"
if [ "$indexers" -gt 0 ]; then
    [ -n "$run" ] || fail "--indexers: the run that they follow is missing; --run DIR"
    case " $* " in
    *" --no-index.local "*) ;;
    # Else the trainer starts one of its own.
    *) set -- "$@" --no-index.local ;;
    esac
fi

if [ -n "$xpk" ]; then
    [ -n "$cluster" ] || fail "--xpk: --cluster is missing"
    check_search_r3 "$@"
    xpk_command "$@"
    exit
fi
if [ -n "$claim" ] && [ -n "$bucket" ] || [ -z "$claim$bucket" ]; then
    fail "--claim or --bucket: where the run's folder lies; one of them"
fi
case "$run" in
'' | "$mount"/*) ;;
*) fail "--run $run: it has to lie in $mount, which all hosts see and which outlives them" ;;
esac
check_search_r3 "$@"
need python3 "it fills in the manifests"
[ -n "$dry_run" ] || need kubectl "https://cloud.google.com/sdk/docs/install"
filled="$(manifests "$@")"
if [ -n "$dry_run" ]; then
    # A comment: the rest can be given to kubectl as it is.
    printf '# %s\n%s\n' "$(quoted kubectl apply --filename=-)" "$filled"
else
    kubectl apply --filename=- <<<"$filled"
    echo "kubectl logs --namespace=$namespace --follow --selector=jobset.sigs.k8s.io/jobset-name=$name shows what it writes"
fi
