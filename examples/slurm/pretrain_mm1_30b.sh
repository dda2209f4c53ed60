#!/usr/bin/env bash
# MM1-30B on 256 GPUs.
#
#   sbatch examples/slurm/pretrain_mm1_30b.sh [mm1 train options]
#
# 6 bytes a parameter are 180 GB. A model fills one node: four GPUs share each layer (eight would leave them products half as
# wide), two stages share the layers, so that only activations between stages and gradients leave NVLink's reach.
#SBATCH --job-name=mm1-30b
#SBATCH --nodes=32
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

train --preset mm1-30b \
  --parallel.tensor_model_parallel_size 4 --parallel.sequence_parallel true --parallel.vision_parallel_mode data \
  --parallel.pipeline_model_parallel_size 2 \
  --parallel.use_distributed_optimizer true --parallel.overlap_grad_reduce true \
  --checkpoint.keep_last 3 --checkpoint.keep_every 10000 \
  "${TRAIN_OPTIONS[@]}" "$@"
