#!/usr/bin/env bash
# Trains under Slurm: one task per GPU. GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS may be set.
# Usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of train.py]
set -euo pipefail
if [ $# -lt 3 ]; then sed -n 3p "$0" >&2; exit 2; fi
partition=$1 job=$2 config=$3
shift 3

# SRUN_ARGS is a list of options: it must split at spaces.
# shellcheck disable=SC2086
srun --partition="$partition" --job-name="$job" --ntasks="${GPUS:-8}" --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --gres="gpu:${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
