#!/usr/bin/env bash
# Few-shot results of a checkpoint: each job of the array evaluates one task with 0, 4 and 8 demonstrations, and again with the
# demonstrations' images exchanged.
#
#   sbatch examples/slurm/eval_fewshot_array.sh runs/mm1-3b                  # MM1's seven benchmarks, from $DATA/coco, $DATA/nocaps, ..
#   TASKS="demo_captions demo_questions" sbatch --array=0-1 examples/slurm/eval_fewshot_array.sh runs/quickstart --limit 400
#
# Options after the checkpoint are those of `mm1 eval --help`, and outrank these. Reports are in $OUTPUT/TASK. A job that was ended
# by its time limit, preemption or a fault goes on where it was when it runs again: submit it once more with the same $OUTPUT.
#SBATCH --job-name=mm1-eval
#SBATCH --array=0-6
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail
source examples/slurm/launch.sh

if (($# == 0)); then
  say "no checkpoint: sbatch examples/slurm/eval_fewshot_array.sh CHECKPOINT [options of mm1 eval]"
  exit "$USER_ERROR"
fi
checkpoint=$1
shift

read -ra tasks <<<"${TASKS:-coco nocaps textcaps vqav2 textvqa vizwiz okvqa}"
if ((SLURM_ARRAY_TASK_ID >= ${#tasks[@]})); then
  say "no task $SLURM_ARRAY_TASK_ID among ${#tasks[@]} (${tasks[*]}): sbatch --array=0-$((${#tasks[@]} - 1)) .."
  exit "$USER_ERROR"
fi
task=${tasks[SLURM_ARRAY_TASK_ID]}
DATA=${DATA:-data/evaluation}
OUTPUT=${OUTPUT:-$checkpoint/few_shot}

folder=() # of the task's files; some tasks know their own
if [[ -d $DATA/$task ]]; then
  folder=(--data "$task=$DATA/$task")
fi
on_every_gpu eval --checkpoint "$checkpoint" --task "$task" "${folder[@]}" --shots 0 4 8 --control --output "$OUTPUT/$task" "$@"
