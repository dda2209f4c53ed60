#!/usr/bin/env bash
# Train mm1-tiny on the demo corpus with two processes (tensor parallel), then look at what it learned.
# Everything it makes is reused when it runs again; `make quickstart` sets up the environment first.
#
# usage: examples/quickstart.sh [RUN_DIR] [mm1 train options..]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${1:-runs/quickstart}
shift $(($# > 0))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mm1 data demo

# Resumes a run that was interrupted, and does nothing for one that is complete.
torchrun --standalone --nproc-per-node 2 -m megatron_mm1 train --preset mm1-tiny --run_dir "$run" \
  --logging.progress_bar true "$@"

# Here each process holds the whole model and takes half of the items: a checkpoint loads into any layout.
torchrun --standalone --nproc-per-node 2 -m megatron_mm1 eval --checkpoint "$run" --tensor-model-parallel-size 1 \
  --task demo_captions --task demo_questions --limit 400 --output "$run/eval"

echo "checkpoint:      $run/checkpoints/$(cat "$run/checkpoints/latest")"
echo "logs:            $run/log.jsonl, tensorboard --logdir $run/tensorboard"
echo "results:         $run/eval/results.json"
echo "report:          $run/eval/report.html"
echo "contact sheet:   $run/eval/contact_sheet.png"
