#!/usr/bin/env bash
# Makes the plans of launch/plans/ anew: what each stage of the published models takes of a slice, and what each experiment does.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
. "$here/common.sh"

usage() {
    cat <<'HELP'
launch/plans.sh [FLAGS] [NAME…]

  --out FOLDER   where the plans go (launch/plans)
  --dry-run      print the commands, run nothing

NAME chooses plans, as in 'Qwen2.5-1.5B/v5e-16/*' or experiments/qwen25_7b; without one all are made, each in one to some twenty minutes on two cores.
Needs search-r3 with the extra `plan`, and no TPU.
HELP
}

out="$here/plans" dry_run=
names=()
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="$(value_of "$@")"; shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        --help) usage; exit 0 ;;
        -*) fail "$1: no such flag; --help lists them" ;;
        *) names+=("$1"); shift ;;
    esac
done

made=0
# plan NAME SLICE STAGE ARGUMENT…: one plan, where it was asked for.
plan() {
    local name="$1" slice="$2" stage="$3" pattern chosen=
    shift 3
    for pattern in "${names[@]:-*}"; do
        # shellcheck disable=SC2053
        if [[ $name == $pattern ]]; then chosen=yes; fi
    done
    if [ -z "$chosen" ]; then return; fi
    made=$((made + 1))
    act mkdir -p "$(dirname "$out/$name")"
    act search-r3 plan --stage "$stage" --topology "$slice" "$@" --out "$out/$name.json"
}

# stages MODEL SLICE CONFIG PAIRS QUERIES ARGUMENT…: all four; updates of as many pairs, and of as many queries, as one pass takes.
stages() {
    local name="$1/$2" slice="$2" config="$3" pairs="$4" queries="$5"
    shift 5
    plan "$name/sft" "$slice" sft --config "$config" --sft.global-batch "$pairs" --sft.encode-chunk "$pairs" "$@"
    plan "$name/rl" "$slice" rl --config "$config" --rl.global-queries "$queries" --rl.micro-queries 0 "$@"
    plan "$name/decode" "$slice" decode --config "$config" "$@"
    plan "$name/encode" "$slice" encode --config "$config" "$@"
}

need search-r3 "pip install the checkout with its extra plan"

stages Qwen2.5-1.5B v5e-16 qwen25_1p5b 64 32
stages Qwen2.5-1.5B v5p-16 qwen25_1p5b 256 64
stages Qwen2.5-1.5B v6e-16 qwen25_1p5b 128 64
stages Qwen2.5-7B v5e-16 qwen25_7b_lora 32 16
stages Qwen2.5-7B v5p-16 qwen25_7b 128 32
stages Qwen2.5-7B v6e-16 qwen25_7b 64 32
stages Qwen3-8B v5e-16 qwen3_8b 32 16
stages Qwen3-8B v5p-16 qwen3_8b 128 32
stages Qwen3-8B v6e-16 qwen3_8b 64 32

# experiment NAME SLICE ARGUMENT…: the updates of both stages as it says, in the parts that it says.
experiment() {
    local name="experiments/$1/$2" slice="$2" config="$1"
    shift 2
    plan "$name/sft" "$slice" sft --config "$config" "$@"
    plan "$name/rl" "$slice" rl --config "$config" "$@"
}

experiment qwen25_1p5b v5e-16
experiment qwen25_7b v5p-16
experiment qwen25_7b_lora v5e-16
experiment qwen3_8b v5p-16
# Made for a laptop; on the smallest slice that there is.
experiment smollm2 v5e-1
experiment quickstart v5e-1

# Stage 2 on the eight chips of one host.
for stage in rl decode encode; do
    plan "experiments/qwen25_1p5b/v5e-8/$stage" v5e-8 "$stage" --config qwen25_1p5b --rl.micro-queries 16
done

# The indexer: each host of its slices, of whatever size, is a world of its own with four chips.
plan Qwen2.5-1.5B/v5e-4/encode v5e-4 encode --config qwen25_1p5b
plan Qwen2.5-7B/v5e-4/encode v5e-4 encode --config qwen25_7b_lora

# with_index NAME SLICE CONFIG DOCUMENTS ARGUMENT…: all that stage 2 does on its chips, with the vectors of so many documents on them.
with_index() {
    local name="device-index/$1/$2" slice="$2" config="$3" documents="$4"
    shift 4
    for stage in rl decode encode search; do
        plan "$name/$stage" "$slice" "$stage" --config "$config" --documents "$documents" --index.kind device \
            --index.vector-dtype bfloat16 "$@"
    done
}

with_index Qwen2.5-1.5B-8.8M v5e-16 qwen25_1p5b 8800000
with_index Qwen2.5-7B-8.8M v5p-16 qwen25_7b 8800000
# A query a chip at least.
with_index Qwen2.5-1.5B-100M v6e-64 qwen25_1p5b 100000000 --rl.micro-queries 64

if [ "$made" -eq 0 ]; then
    fail "${names[*]}: no such plan; --dry-run lists them"
fi
