#!/usr/bin/env bash
# LLaVA-1.5, second stage: connector and decoder learn from conversations, on 8 GPUs (docs/llava15.md).
#
#   sbatch examples/slurm/llava15_sft.sh runs/llava15-align [mm1 train options]
#
# The decoder's optimizer state is shared out over all GPUs.
#SBATCH --job-name=llava15-sft
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

train_from "${1:-}" --recipe llava15-sft \
  --parallel.tensor_model_parallel_size 1 --parallel.pipeline_model_parallel_size 1 \
  --parallel.use_distributed_optimizer true --parallel.overlap_grad_reduce true \
  --checkpoint.keep_last 2 \
  "${TRAIN_OPTIONS[@]}" "${@:2}"
