#!/usr/bin/env bash
# Builds the image and tries it: what is in it, what must not be, `mm1 doctor`, parallel tests of two processes, and
# training steps of two nodes under srun. Leaves the built layers in the state folder, and nothing else.
#
# usage: tests/container/test.sh        (as root; variables as for build.sh, and PYTHON with psutil, .venv/bin/python)
set -euo pipefail
# shellcheck source=tests/container/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
cd "$repository"
scripts=tests/container
PYTHON=${PYTHON:-.venv/bin/python}

traces() { # what container engines leave on a machine, and what runs or is mounted for this folder
  find /etc/cni /run/{buildah,containers,crun,libpod,netns,runc} /var/lib/{cni,containers} /var/tmp/buildah* \
    -printf '%p %T@\n' 2>/dev/null | sort
  awk -v state="$STATE/" 'index($2, state) == 1 { print "mounted: " $2 }' /proc/mounts
  grep -lz "^CONTAINER_APART=$STATE\$" /proc/[0-9]*/environ 2>/dev/null | sed 's/^/process: /' || true
  git status --porcelain 2>/dev/null || true
}

if ! is_apart; then
  prepare
  "$PYTHON" -c 'from tests.slurm.cluster import install_slurm; install_slurm()'
  before=$(traces)
  run_apart "$scripts/test.sh"
  diff <(echo "$before") <(traces) >&2 || die "something was left behind, see above"
  echo "container: ok: no process, mount or file is left outside of $STATE"
  exit
fi

passed=0
check() { # WHAT COMMAND..: fails the script where the command does
  local what=$1 start=$SECONDS
  shift
  if ! "$@" >"$STATE/check.log" 2>&1; then
    cat "$STATE/check.log" >&2
    echo "container: FAILED: $what" >&2
    exit 1
  fi
  passed=$((passed + 1))
  echo "container: ok: $what ($((SECONDS - start)) s)"
}

inside() { "$scripts/run.sh" "$@"; }

"$scripts/build.sh"

# shellcheck disable=SC2016  # for the shell inside
check "the user is not root, and can write to a run's folder and not to the package" inside -- bash -c \
  '[[ $(id -u) == 10001 ]] && touch /tmp/file "$HOME/file" file && ! touch /opt/file && ! touch README.md'
check "the package is installed, its sources are not" inside -- python -c \
  'import megatron_mm1, os; assert "site-packages" in megatron_mm1.__file__; assert not os.path.exists("megatron_mm1")'
check "what only tests need is not in the runtime image" inside -- python -c \
  'import importlib.util as u; assert not any(map(u.find_spec, ("pytest", "transformers", "moto", "ruff")))'
check "certificates and pip settings of this machine are not in the image" inside -- bash -c \
  '[[ ! -s /etc/pip.conf ]] && find /usr/share/ca-certificates -name "*.crt" -exec cat {} + | sort -u |
   cmp - <(sort -u /etc/ssl/certs/ca-certificates.crt)'
check "mm1 doctor finds it fit to train" inside -- mm1 doctor --for train --run-dir /tmp/runs
check "parallel tests of two processes pass" inside --stage test --env OMP_NUM_THREADS=1 -- \
  pytest -q -p no:cacheprovider tests/parallel/test_gloo.py tests/parallel/test_vision_tp.py

# Rank 0 looks at what it has printed: each of two processes that do not find one another would train as well.
# shellcheck disable=SC2016  # for the shell inside
training='
  set -o pipefail
  mm1 bench step --preset mm1-tiny --synthetic --warmup 1 --steps 2 --output /tmp/bench | tee /tmp/log
  ((SLURM_PROCID > 0)) || grep "^layout: 2 processes" /tmp/log'
two_nodes_train() { # in the image, one process a node
  MASTER_ADDR=node1 MASTER_PORT=$((20000 + RANDOM % 10000)) OMP_NUM_THREADS=1 "$PYTHON" -m tests.slurm.cluster \
    srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit "$scripts/run.sh" -- bash -ec "$training"
}
check "two nodes train together under srun" two_nodes_train

echo "$passed passed, 0 failed"
