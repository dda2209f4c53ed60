#!/usr/bin/env bash
# Fine-tunes a model on conversations (docs/finetuning.md), on 64 GPUs.
#
#   sbatch examples/slurm/sft.sh runs/mm1-3b [mm1 train options]     # a run, or what `mm1 convert import` wrote
#
# The layout is that of the checkpoint's own configuration; options change it. AdaFactor, the recipe's choice, does not share
# its state out over data-parallel ranks.
#SBATCH --job-name=mm1-sft
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
source examples/slurm/launch.sh

train_from "${1:-}" --recipe sft \
  --parallel.use_distributed_optimizer false \
  --checkpoint.keep_last 3 \
  "${TRAIN_OPTIONS[@]}" "${@:2}"
