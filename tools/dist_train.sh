#!/usr/bin/env bash
# Trains in several processes: one per GPU, or as many as you like without GPUs. For several machines, set NNODES,
# NODE_RANK, MASTER_ADDR and PORT on each.
# Usage: tools/dist_train.sh CONFIG PROCESSES [options of train.py]
set -euo pipefail
if [ $# -lt 2 ]; then sed -n 4p "$0" >&2; exit 2; fi
config=$1 processes=$2
shift 2
if [[ $config != *::* && ! -f $config ]]; then echo "dist_train.sh: error: there is no file $config" >&2; exit 2; fi

torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
