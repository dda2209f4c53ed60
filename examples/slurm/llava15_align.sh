#!/usr/bin/env bash
# LLaVA-1.5, first stage: the connector of an imported model learns from captions, on 8 GPUs (docs/llava15.md).
#
#   sbatch examples/slurm/llava15_align.sh start [mm1 train options]     # start: what `mm1 convert import` wrote
#
# Only the connector has gradients and optimizer state, so every GPU has the whole model.
#SBATCH --job-name=llava15-align
#SBATCH --nodes=1
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

train_from "${1:-}" --recipe llava15-align \
  --parallel.tensor_model_parallel_size 1 --parallel.pipeline_model_parallel_size 1 \
  --parallel.use_distributed_optimizer true \
  --checkpoint.keep_last 2 \
  "${TRAIN_OPTIONS[@]}" "${@:2}"
