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
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=02:00:00
#SBATCH --output=mm1-parity-%j.log
set -euo pipefail

MM1=${MM1:-mm1} # the command, inside a container for example
OUTPUT=${OUTPUT:-runs/parity/${SLURM_JOB_ID:-local}}
LAYOUTS=${LAYOUTS:-pairs}

compare() {
  local name=$1
  shift
  $MM1 parity --layouts "$LAYOUTS" --output "$OUTPUT/$name" ${WORLD_SIZE:+--world-size "$WORLD_SIZE"} "$@"
}

if (($# > 0)); then
  compare given "$@"
else
  failed=0
  compare dense --preset mm1-tiny || failed=1
  compare experts --preset mm1-tiny-moe || failed=1
  exit "$failed"
fi
