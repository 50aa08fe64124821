#!/usr/bin/env bash
# Trains on a TPU node pool of GKE: a JobSet for the trainer and, for stage 2, a Job for its indexer.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$folder/../common.sh"

usage() {
    cat <<'HELP'
launch/gke/submit.sh FLAGS -- ARGUMENTS OF search-r3

  --name NAME               of the JobSet (search-r3); the indexer's is NAME-indexer
  --image IMAGE             an image made by launch/Containerfile
  --claim NAME              a volume claim that many may write to (Filestore): the folder of --run lies in it
  --bucket NAME             a bucket, mounted, in its place; it knows no locks, so nothing keeps two trainers off one run
  --mount PATH              where either is mounted (/mnt/search-r3)
  --accelerator A           label of the node pool (tpu-v5-lite-podslice; tpu-v5p-slice, tpu-v6e-slice …)
  --topology T              the other label: chips of a slice (4x4; 2x2x2 for v4 and v5p)
  --chips N                 chips of a host (4)
  --slices N                as many slices, joined by the data-centre network (1); training gets --mesh.slice N
  --node-pool NAME          the node pool; without it any with these labels
  --spot                    on spot nodes
  --indexers N              slices of the indexer (0: none); each host of them takes its share of the corpus
  --indexer-accelerator A   as --accelerator
  --indexer-topology T      chips of each (2x2; 2x2x1 for v4 and v5p)
  --indexer-chips N         chips of a host of them (4, or as many as the topology has, if fewer)
  --indexer-pool NAME       their node pool
  --secret NAME             a secret of the cluster, as environment (HF_TOKEN): kubectl create secret generic NAME
                            --from-env-file=FILE
  --account NAME            service account (default)
  --namespace NAME          (default)
  --restarts N              of the JobSet, each from the last checkpoint (100); as many of each process of the indexer
  --pause SECONDS           before it starts again after status 75 (10); doubled each time, up to five minutes. Status 2,
                            a mistake, ends it
  --grace SECONDS           from SIGTERM to SIGKILL (120)
  --delete                  delete both, in place of starting them
  --xpk                     print the command for xpk that starts the trainer, with --cluster NAME and, for what is
                            mounted, --storage NAME; xpk takes a run that was asked to stop for a finished one: submit
                            it again
  --project, --zone         for that command
  --dry-run                 print the manifests, start nothing
HELP
}

# chips_of FLAG TOPOLOGY ACCELERATOR: 4x4 is 16; a topology has as many sizes as the accelerator's slices.
chips_of() {
    local sizes
    [[ "$2" =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] || fail "$1: '$2': such as 4x4 or 2x2x4"
    sizes="${2//[0-9]/}"
    case "$3 $sizes" in
    "tpu-v5p-slice x" | "tpu-v4-podslice x") fail "$1: '$2': slices of $3 have three sizes, such as ${2}x1" ;;
    "tpu-v5-lite-podslice xx" | "tpu-v6e-slice xx") fail "$1: '$2': slices of $3 have two sizes, such as 4x4" ;;
    esac
    echo $((${2//x/*}))
}

# hosts_of FLAG TOPOLOGY CHIPS OF_A_HOST: how many hosts a slice has.
hosts_of() {
    if [ "$4" -eq 0 ] || [ $(($3 % $4)) -ne 0 ]; then
        fail "$1: $2 has $3 chips, which is no multiple of the $4 of a host"
    fi
    echo $(($3 / $4))
}

# bounds_of CHIPS: how the chips of a host lie.
bounds_of() {
    case "$1" in
    1) echo 1,1,1 ;;
    4) echo 2,2,1 ;;
    8) echo 2,4,1 ;;
    *) fail "--indexer-chips: $1: hosts have 1, 4 or 8" ;;
    esac
}

# manifests ARGUMENT…: what the cluster is asked for.
manifests() {
    local shared=(
        "namespace=$namespace" "account=$account" "image=$image" "spot=${spot:+true}" "secret=$secret"
        "mount=$mount" "claim=$claim" "bucket=$bucket" "fuse=${bucket:+true}"
        # A checkpoint is renamed into place as a folder, which a bucket does file by file, and only up to a number of
        # them.
        "options=implicit-dirs,rename-dir-limit=200000"
    )
    python3 "$folder/fill.py" "$folder/trainer.yaml" "${shared[@]}" "name=$name" "accelerator=$accelerator" \
        "topology=$topology" "pool=$node_pool" "slices:=$slices" "chips:=$chips" "hosts:=$hosts" \
        "restarts:=$restarts" "pause:=$pause" "grace:=$grace" -- "$@"
    if [ "$indexers" -gt 0 ]; then
        echo ---
        python3 "$folder/fill.py" "$folder/indexer.yaml" "${shared[@]}" "name=$name-indexer" \
            "accelerator=$indexer_accelerator" "topology=$indexer_topology" "pool=$indexer_pool" \
            "chips:=$indexer_chips" "bounds=$indexer_bounds" "processes:=$((indexers * indexer_hosts))" \
            "failures:=$((restarts * indexers * indexer_hosts))" "run=$run" --
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
    quoted xpk workload create "--workload=$name" "--cluster=$cluster" ${project:+"--project=$project"} \
        ${zone:+"--zone=$zone"} "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
        ${storage:+"--storage=$storage"} ${spot:+--spot} "--max-restarts=$restarts" --restart-on-exit-codes=1,3-126 \
        "--termination-grace-period-seconds=$grace" "--command=exec $(quoted search-r3 "$@")"
    echo
}

name=search-r3 image='' claim='' bucket='' mount=/mnt/search-r3 accelerator=tpu-v5-lite-podslice topology='' chips=4
slices=1 node_pool='' spot='' indexers=0 indexer_accelerator='' indexer_topology='' indexer_chips='' indexer_pool=''
secret='' account=default namespace=default restarts=100 pause=10 grace=120 cluster='' storage='' project='' zone=''
delete='' xpk='' dry_run=''
check_arguments "$@"
while [ $# -gt 0 ]; do
    case "$1" in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --name | --image | --claim | --bucket | --mount | --accelerator | --topology | --chips | --slices | --node-pool | \
        --indexers | --indexer-accelerator | --indexer-topology | --indexer-chips | --indexer-pool | --secret | \
        --account | --namespace | --restarts | --pause | --grace | --cluster | --storage | --project | --zone)
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
indexer_accelerator="${indexer_accelerator:-$accelerator}"
for flag in image account accelerator indexer-accelerator; do
    variable="${flag//-/_}"
    check_word "--$flag" "${!variable}"
done
for flag in claim bucket secret cluster storage project zone node-pool indexer-pool; do
    variable="${flag//-/_}"
    [ -z "${!variable}" ] || check_word "--$flag" "${!variable}"
done
[[ "$mount" =~ ^/[A-Za-z0-9._/-]+$ ]] || fail "--mount: '$mount': a path from /"
for flag in chips slices indexers restarts pause grace; do
    check_count "--$flag" "${!flag}"
done

# flat_or_deep ACCELERATOR FLAT DEEP: what is said of slices with two sizes, or with three.
flat_or_deep() {
    case "$1" in
    tpu-v5p-slice | tpu-v4-podslice) echo "$3" ;;
    *) echo "$2" ;;
    esac
}
topology="${topology:-"$(flat_or_deep "$accelerator" 4x4 2x2x2)"}"
total="$(chips_of --topology "$topology" "$accelerator")"
hosts="$(hosts_of --topology "$topology" "$total" "$chips")"
[ "$slices" -ge 1 ] || fail "--slices: at least 1"
if [ "$slices" -gt 1 ]; then
    [ "$hosts" -gt 1 ] || fail "--slices: GKE joins slices of several hosts only; take a larger --topology than $topology"
    [ -z "$node_pool" ] || fail "--node-pool: a node pool is one slice, and --slices is $slices; leave it out"
fi
run="$(value_in --run "$@")"
if [ "$indexers" -gt 0 ]; then
    [ -n "$run" ] || fail "--indexers: the run that they follow is missing; --run DIR"
    indexer_topology="${indexer_topology:-"$(flat_or_deep "$indexer_accelerator" 2x2 2x2x1)"}"
    indexer_total="$(chips_of --indexer-topology "$indexer_topology" "$indexer_accelerator")"
    indexer_chips="${indexer_chips:-$((indexer_total < 4 ? indexer_total : 4))}"
    check_count --indexer-chips "$indexer_chips"
    indexer_hosts="$(hosts_of --indexer-topology "$indexer_topology" "$indexer_total" "$indexer_chips")"
    indexer_bounds="$(bounds_of "$indexer_chips")"
    if [ "$indexer_topology $indexer_accelerator $indexer_pool" = "$topology $accelerator " ] && [ "$hosts" -gt 1 ]; then
        # Each would take hosts of the other's node pool, and neither would have all of its own.
        fail "--indexer-topology: $topology is the trainer's, too; --indexer-pool NAME tells the node pools apart"
    fi
    case " $* " in
    *" --index.local "*) fail "--index.local: --indexers starts the indexer; leave one of them out" ;;
    *" --index.no-local "*) ;;
    # Else the trainer starts one of its own.
    *) set -- "$@" --index.no-local ;;
    esac
fi
add_slice_axis "$slices" "$@"
set -- "${arguments[@]}"

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
