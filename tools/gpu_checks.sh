#!/usr/bin/env bash
# Everything worth running on a machine with a GPU, in one call: a smoke test, tests/gpu, and in what time is left the
# benchmark. Run it from the repository's root; it needs no network and no .venv.
#
# usage: OUT=folder tools/gpu_checks.sh
#
# Variables: OUT             where logs and results go (default: gpu-checks)
#            LIMIT           seconds for everything (default: 580)
#            TESTS_LIMIT     seconds for tests/gpu (default: 480)
#            PYTHON          the interpreter (default: .venv's where it runs, else python3)
#            BENCHMARK_ARGS  words for benchmarks/gpu.py
#
# A Transformer Engine bundle in .te, whose unpack.sh sets PYTHONPATH when sourced, is unpacked first.
#
# Exit status: 0 where everything passed; 1 where the smoke test, a test or the benchmark failed, ran out of its time or,
# for the benchmark alone, had no time left. summary.txt in OUT says which.
set -euo pipefail

OUT=${OUT:-gpu-checks}
LIMIT=${LIMIT:-580}
TESTS_LIMIT=${TESTS_LIMIT:-480}
LEAST_SECONDS=90 # of a benchmark that is worth starting
read -ra benchmark_args <<<"${BENCHMARK_ARGS:-}"

mkdir -p "$OUT"
summary=$OUT/summary.txt
: >"$summary"
failed=0

left() { echo $((LIMIT - SECONDS)); }

check() { # NAME SECONDS COMMAND..: runs it, within what is left of LIMIT too; its log goes to OUT/NAME.log
  local name=$1 seconds=$2 status=0 started=$SECONDS
  shift 2
  seconds=$((seconds < $(left) ? seconds : $(left)))
  if ((seconds <= 0)); then
    failed=1
    echo "$name: not run, no time left" | tee -a "$summary"
    return
  fi
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" || status=${PIPESTATUS[0]}
  local verdict="exit status $status"
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="stopped after $seconds s" ;;
  esac
  ((status == 0)) || failed=1
  echo "$name: $verdict ($((SECONDS - started)) s)" | tee -a "$summary"
}

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if .venv/bin/python -c '' 2>/dev/null; then PYTHON=.venv/bin/python; fi
fi
if [[ -e .te/unpack.sh ]]; then
  # shellcheck source=/dev/null
  . .te/unpack.sh
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

check machine 30 nvidia-smi
if [[ -e .te/te_smoke.py ]]; then
  check smoke 120 "$PYTHON" .te/te_smoke.py
else
  check smoke 120 "$PYTHON" -c '
import torch, transformer_engine.pytorch as te
layer = te.Linear(256, 256, params_dtype=torch.bfloat16, device="cuda")
with te.autocast(enabled=True):
    layer(torch.ones(16, 256, device="cuda", dtype=torch.bfloat16)).sum().backward()
print(torch.cuda.get_device_name(), float(layer.weight.grad.float().norm()))'
fi
check tests "$TESTS_LIMIT" "$PYTHON" -m pytest -q -m gpu --continue-on-collection-errors \
  -p no:cacheprovider --durations=15 --junitxml="$OUT/tests.xml" tests/gpu
if (($(left) >= LEAST_SECONDS)); then
  # It ends in time by itself, and so writes its cards.
  minutes=$(awk -v seconds="$(($(left) - 15))" 'BEGIN { print seconds / 60 }')
  check benchmark "$(left)" "$PYTHON" benchmarks/gpu.py --minutes "$minutes" --output "$OUT" "${benchmark_args[@]}"
else
  failed=1
  echo "benchmark: not run, $(left) s are left" | tee -a "$summary"
fi

echo && cat "$summary"
exit "$failed"
