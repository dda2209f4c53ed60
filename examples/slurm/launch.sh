# shellcheck shell=bash
# What the scripts beside this file share: source it in a job that was submitted from the repository's root.
#
#   on_every_gpu COMMAND..   `mm1 COMMAND` as one job of processes, one per GPU
#   on_first_node COMMAND..  `mm1 COMMAND` as one process, which sees all GPUs of its node
#   train OPTIONS..          `mm1 train` into $RUN_DIR, requeued until it is through
#   train_from DIR OPTIONS.. the same from the model and weights of a checkpoint that has a config.yaml
set -euo pipefail

# shellcheck source=/dev/null
source examples/slurm/site.env
if [[ -n ${MM1_SITE:-} ]]; then
  # shellcheck source=/dev/null
  source "$MM1_SITE"
fi
prepare

# Exit codes of mm1: docs/cluster.md.
CHECK_FAILED=1
USER_ERROR=2
ENDED_BY_SIGNAL=75

export MASTER_ADDR MASTER_PORT
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not meet
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Jobs of an array are runs of their own.
RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME}${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}

say() { echo "launch.sh: $*" >&2; }

# step NODES TASKS_PER_NODE COMMAND..: a job step, in the site's container.
step() {
  local nodes=$1 per_node=$2 cpus mounts
  shift 2
  cpus=$((SLURM_CPUS_ON_NODE / per_node))
  # When a rank fails, the others end by themselves within seconds, with an exit code that says why (docs/faults.md). Slurm may
  # kill those that do not, but not at once: the step's exit code is the highest, and would be that of a kill.
  local options=(--nodes="$nodes" --ntasks="$((nodes * per_node))" --ntasks-per-node="$per_node"
    --cpus-per-task="$((cpus > 0 ? cpus : 1))" --kill-on-bad-exit=0 --wait=60)
  mounts=$(for folder in "${CONTAINER_MOUNTS[@]}"; do printf ',%s:%s' "$folder" "$folder"; done)
  case $CONTAINER in
    none) srun "${options[@]}" "$@" ;;
    pyxis)
      srun "${options[@]}" --container-image="$CONTAINER_IMAGE" --container-mounts="${mounts#,}" \
        --container-workdir="$PWD" "$@"
      ;;
    apptainer) srun "${options[@]}" apptainer exec --nv --bind "${mounts#,}" --pwd "$PWD" "$CONTAINER_IMAGE" "$@" ;;
    *) say "CONTAINER=$CONTAINER: use none, pyxis or apptainer" && return "$USER_ERROR" ;;
  esac
}

on_first_node() { step 1 1 python -m megatron_mm1 "$@"; }

on_every_gpu() {
  case $LAUNCHER in
    srun) step "$SLURM_NNODES" "$PROCESSES_PER_NODE" python -m megatron_mm1 "$@" ;;
    torchrun)
      # Slurm signals every process of a step. torchrun would give its workers 30 s to save, so it is left to them.
      # shellcheck disable=SC2016
      step "$SLURM_NNODES" 1 bash -c 'trap "" TERM USR1; exec "$@"' _ \
        python -m megatron_mm1.torchrun --signals-to-handle SIGINT \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES_PER_NODE" \
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID" \
        -m megatron_mm1 "$@"
      ;;
    *) say "LAUNCHER=$LAUNCHER: use srun or torchrun" && return "$USER_ERROR" ;;
  esac
}

train() {
  local code=0
  note_start
  if [[ $HEALTH_CHECK == yes ]]; then
    through_signals on_every_gpu health "${HEALTH_OPTIONS[@]}" || code=$?
    if ((code == CHECK_FAILED)); then
      say "not requeued: leave out the node named above (sbatch --exclude=NODE)"
      exit "$code"
    fi
  fi
  if ((code == 0)); then
    through_signals on_every_gpu train --run_dir "$RUN_DIR" --fp8.decoder_recipe "$FP8_RECIPE" "$@" || code=$?
  fi
  case $code in
    0) return ;;
    "$USER_ERROR") say "not requeued: the error above is not mended by another try" && exit "$code" ;;
    "$ENDED_BY_SIGNAL") say "ended by a signal, with a checkpoint" ;;
    *) say "ended with exit code $code" ;;
  esac
  requeue
  exit "$code"
}

train_from() {
  local checkpoint=$1
  shift
  if [[ ! -f $checkpoint/config.yaml ]]; then
    say "no config.yaml in '$checkpoint': sbatch SCRIPT CHECKPOINT [options of mm1 train]"
    exit "$USER_ERROR"
  fi
  train --config "$checkpoint/config.yaml" --checkpoint.load "$checkpoint" "$@"
}

# Runs a command, and on the scheduler's signals asks the step to save and end instead of ending with it.
through_signals() {
  local signals=0 before code command
  trap 'signals=$((signals + 1)); scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM
  "$@" &
  command=$!
  while true; do
    before=$signals code=0
    wait "$command" || code=$?
    ((signals > before)) || break # else it was the signal that ended the wait
  done
  trap - USR1 TERM
  return "$code"
}

newest_checkpoint() { cat "$RUN_DIR/checkpoints/latest" 2>/dev/null || echo none; }

# How often this job has started from its newest checkpoint, in vain if that is still the newest one when it ends.
starts_from_newest() {
  grep --count --line-regexp --fixed-strings "$SLURM_JOB_ID $(newest_checkpoint)" "$RUN_DIR/starts" || true
}

note_start() {
  mkdir -p "$RUN_DIR"
  echo "$SLURM_JOB_ID $(newest_checkpoint)" >>"$RUN_DIR/starts"
  local starts
  starts=$(starts_from_newest)
  # Slurm itself requeues after preemption or the loss of a node.
  if ((starts > MAX_STARTS_FROM_ONE_CHECKPOINT)); then
    say "started $((starts - 1)) times from checkpoint $(newest_checkpoint) without another one: not started again"
    exit 1
  fi
}

requeue() {
  local starts restarts=${SLURM_RESTART_COUNT:-0}
  starts=$(starts_from_newest)
  if [[ $REQUEUE != yes ]]; then
    say "not requeued: REQUEUE is $REQUEUE"
  elif ((restarts >= MAX_RESTARTS)); then
    say "not requeued: restarted $restarts times"
  elif ((starts >= MAX_STARTS_FROM_ONE_CHECKPOINT)); then
    say "not requeued: started $starts times from checkpoint $(newest_checkpoint) without another one"
  elif [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo RUNNING) != RUNNING ]]; then
    say "not requeued here: the job was cancelled, or Slurm is requeueing it"
  else
    say "requeued, to go on from checkpoint $(newest_checkpoint)"
    for _ in {1..30}; do # Slurm's controller may be restarting
      scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script
      sleep 10
    done
  fi
}
