#!/usr/bin/env bash
# MM1-7B on 128 GPUs.
#
#   sbatch examples/slurm/pretrain_mm1_7b.sh [mm1 train options]
#
# 6 bytes a parameter are 44 GB, and activations of a sequence with 16 images would not fit beside them: two GPUs of a node
# share the model and the images, over NVLink.
#SBATCH --job-name=mm1-7b
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

train --preset mm1-7b \
  --parallel.tensor_model_parallel_size 2 --parallel.sequence_parallel true --parallel.vision_parallel_mode data \
  --parallel.use_distributed_optimizer true --parallel.overlap_grad_reduce true \
  --checkpoint.keep_last 3 --checkpoint.keep_every 10000 \
  "${TRAIN_OPTIONS[@]}" "$@"
