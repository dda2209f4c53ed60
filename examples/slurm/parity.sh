#!/usr/bin/env bash
# Before a real run: shows that every parallel layout computes the same model on the GPUs of one node.
#
#   sbatch examples/slurm/parity.sh                                   # mm1-tiny and mm1-tiny-moe, layouts that cover every pair
#   LAYOUTS=all sbatch examples/slurm/parity.sh                       # every legal layout
#   sbatch examples/slurm/parity.sh --preset mm1-30b --num_layers 4   # the shape you will train, with fewer blocks
#
# One task, which starts a worker process for each GPU. Exit code 1 if a layout differs; the report is in $OUTPUT.
#SBATCH --job-name=mm1-parity
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
source examples/slurm/launch.sh

OUTPUT=${OUTPUT:-runs/parity/$SLURM_JOB_ID}
LAYOUTS=${LAYOUTS:-pairs}

compare() {
  local name=$1
  shift
  on_first_node parity --layouts "$LAYOUTS" --world-size "$PROCESSES_PER_NODE" --output "$OUTPUT/$name" "$@"
}

if (($# > 0)); then
  compare given "$@"
else
  failed=0
  compare dense --preset mm1-tiny || failed=1
  compare experts --preset mm1-tiny-moe || failed=1
  exit "$failed"
fi
