#!/usr/bin/env bash
# Builds the image and tries it: what is in it, what must not be, `mm1 doctor`, and parallel tests of two processes.
# Leaves the built layers in the state folder, and no process, container or mount.
#
# usage: tests/container/test.sh        (as root; variables as for build.sh)
set -euo pipefail
# shellcheck source=tests/container/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
scripts=$(dirname "${BASH_SOURCE[0]}")

clean_up() {
  [[ ! -e $CONTAINERS_CONF ]] || podman rm --all --force --time 0 >/dev/null || true
  unmount_all
}
trap clean_up EXIT

"$scripts/build.sh"

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

# shellcheck disable=SC2016  # for the shell inside
check "the user is not root, and only /tmp can be written" inside -- bash -c \
  '[[ $(id -u) == 10001 ]] && touch /tmp/file && ! touch file /opt/file "$HOME/file"'
check "the package is installed, its sources are not" inside -- python -c \
  'import megatron_mm1, pathlib; assert "site-packages" in megatron_mm1.__file__; assert not pathlib.Path("megatron_mm1").exists()'
check "what only tests need is not in the runtime image" inside -- python -c \
  'import importlib.util as u; assert not any(map(u.find_spec, ("pytest", "transformers", "moto", "ruff")))'
check "certificates and pip settings of this machine are not in the image" inside -- bash -c \
  '[[ ! -s /etc/pip.conf ]] && find /usr/share/ca-certificates -name "*.crt" -exec cat {} + | sort -u |
   cmp - <(sort -u /etc/ssl/certs/ca-certificates.crt)'
check "mm1 doctor finds it fit to train" inside -- mm1 doctor --for train --run-dir /tmp/runs
check "parallel tests of two processes pass" inside --stage test --env OMP_NUM_THREADS=1 -- \
  pytest -q -p no:cacheprovider tests/parallel/test_gloo.py tests/parallel/test_vision_tp.py

clean_up
check "no mount is left" test -z "$(mounts_left)"
echo "$passed passed, 0 failed"
