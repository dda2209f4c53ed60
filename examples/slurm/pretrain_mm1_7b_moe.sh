#!/usr/bin/env bash
# MM1-7B with 32 experts in every fourth block, 47B parameters in all, on 128 GPUs.
#
#   sbatch examples/slurm/pretrain_mm1_7b_moe.sh [mm1 train options]
#
# Eight GPUs of a node hold 4 experts each, so that tokens travel over NVLink, and two stages halve what a GPU holds. The
# first keeps two microbatches in flight, whose images it encodes again in the backward pass.
#SBATCH --job-name=mm1-7b-moe
#SBATCH --nodes=16
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

train --preset mm1-7b-moe \
  --parallel.pipeline_model_parallel_size 2 --parallel.expert_model_parallel_size 8 \
  --training.vision_recompute true \
  --parallel.use_distributed_optimizer true --parallel.overlap_grad_reduce true \
  --checkpoint.keep_last 3 --checkpoint.keep_every 10000 \
  "${TRAIN_OPTIONS[@]}" "$@"
