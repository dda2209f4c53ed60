#!/usr/bin/env bash
# Imports, exports or checks checkpoints where there is memory for it: large models do not fit a login node.
#
#   sbatch examples/slurm/convert_checkpoint.sh export --checkpoint runs/mm1-30b --family transformers --output exported
#   sbatch examples/slurm/convert_checkpoint.sh import --source DECODER --source TOWER --output start --preset mm1-7b
#
# The options are those of `mm1 convert --help`. One process, without a GPU.
#SBATCH --job-name=mm1-convert
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
source examples/slurm/launch.sh

on_first_node convert "$@"
