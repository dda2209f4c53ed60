#!/usr/bin/env bash
# The first job on a new machine: does everything a long run depends on, small, on the 8 GPUs of one node.
#
#   sbatch examples/slurm/smoke_8gpu.sh     # after `make corpus`; ends with "smoke test passed"
#
# A small model is compared across layouts over NCCL, trained in bf16, ended by a signal on the way, requeued, resumed,
# trained in FP8, and exported. What a requeued job has done before is not done again. Settings: SMOKE_* below.
#SBATCH --job-name=mm1-smoke
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
source examples/slurm/launch.sh

OUTPUT=${OUTPUT:-runs/smoke/$SLURM_JOB_ID}
SMOKE_FOR=${SMOKE_FOR:-gpu} # what mm1 doctor decides by
SMOKE_STEPS=${SMOKE_STEPS:-50}
SMOKE_PRECISION=${SMOKE_PRECISION:-bf16}
SMOKE_FP8_RECIPE=${SMOKE_FP8_RECIPE:-fp8_tensorwise} # bf16: machines without FP8 train in bf16 twice
SMOKE_LAYOUTS=${SMOKE_LAYOUTS:-pairs}
SMOKE_PARITY=${SMOKE_PARITY:---batches mixed --steps 1}

# part NAME COMMAND..: once, however often the job starts.
part() {
  local name=$1 started=$SECONDS
  shift
  [[ ! -e $OUTPUT/$name.done ]] || return 0
  say "$name"
  "$@"
  touch "$OUTPUT/$name.done"
  say "$name: passed after $((SECONDS - started)) s"
}

parity() {
  # shellcheck disable=SC2086
  on_first_node parity --preset mm1-tiny --layouts "$SMOKE_LAYOUTS" --world-size "$PROCESSES_PER_NODE" $SMOKE_PARITY \
    --output "$OUTPUT/parity"
}

# train_small NAME RECIPE: with two GPUs to a model, the rest data-parallel.
train_small() {
  RUN_DIR=$OUTPUT/$1 FP8_RECIPE=$2
  train --preset mm1-tiny --parallel.use_distributed_optimizer true --training.precision "$SMOKE_PRECISION" \
    --training.micro_batch_size 4 --training.global_batch_size 32 --training.train_iters "$SMOKE_STEPS" \
    --optimizer.lr_warmup_iters 2 --checkpoint.save_interval "$((SMOKE_STEPS / 4))" "${TRAIN_OPTIONS[@]}"
}

# As the time limit would end it, after its first checkpoint; only at the job's first start.
train_with_requeue() {
  if ((${SLURM_RESTART_COUNT:-0} == 0)); then
    (
      until [[ -e $OUTPUT/bf16/checkpoints/latest ]]; do sleep 0.2; done
      kill -USR1 $$
    ) &
  fi
  train_small bf16 bf16
  ((${SLURM_RESTART_COUNT:-0} > 0)) || { say "the run ended before the signal: raise SMOKE_STEPS" && return 1; }
}

export_model() {
  on_first_node convert export --checkpoint "$OUTPUT/bf16" --family transformers --output "$OUTPUT/exported"
}

mkdir -p "$OUTPUT"
part doctor on_first_node doctor --for "$SMOKE_FOR"
part parity parity
part bf16 train_with_requeue
part fp8 train_small fp8 "$SMOKE_FP8_RECIPE"
part export export_model
say "smoke test passed"
