#!/usr/bin/env bash
# Evaluates in several processes: one per GPU, or as many as you like without GPUs. For several machines, set NNODES,
# NODE_RANK, MASTER_ADDR and PORT on each.
# Usage: tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of test.py]
set -euo pipefail
if [ $# -lt 3 ]; then sed -n 4p "$0" >&2; exit 2; fi
config=$1 checkpoint=$2 processes=$3
shift 3
if [[ $config != *::* && ! -f $config ]]; then echo "dist_test.sh: error: there is no file $config" >&2; exit 2; fi

torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
