#!/usr/bin/env bash
# MM1-3B on 64 GPUs.
#
#   sbatch examples/slurm/pretrain_mm1_3b.sh [mm1 train options]
#
# Weights and gradients take 6 bytes a parameter, 22 GB of a GPU's 80: no need to split the model, so all GPUs are
# data-parallel, with the optimizer's state shared out; 8 microbatches of one sequence hide its gradients' reduction.
#SBATCH --job-name=mm1-3b
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

train --preset mm1-3b \
  --parallel.use_distributed_optimizer true --parallel.overlap_grad_reduce true \
  --checkpoint.keep_last 3 --checkpoint.keep_every 10000 \
  "${TRAIN_OPTIONS[@]}" "$@"
