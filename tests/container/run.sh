#!/usr/bin/env bash
# Runs a command in the image that build.sh has built: not as root, with nothing writable but /tmp and what is mounted.
# Ranks of srun and torchrun find their variables, and the network is the machine's.
#
# usage: tests/container/run.sh [--stage runtime|test] [PODMAN_OPTION..] -- COMMAND..
#   tests/container/run.sh -- mm1 doctor
#   srun --kill-on-bad-exit tests/container/run.sh --volume "$PWD/runs:/workspace/megatron_mm1/runs" -- mm1 train ...
#
# Variables: STATE  where build.sh has put the image (.cache/container)
set -euo pipefail
# shellcheck source=tests/container/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

stage=runtime options=()
while (($# > 0)) && [[ $1 != -- ]]; do
  case $1 in
    --stage) stage=$2 && shift 2 ;;
    *) options+=("$1") && shift ;;
  esac
done
(($# > 1)) || die "no command: run.sh [OPTION..] -- COMMAND.."
shift

# An init hands signals on: a first process without a handler for one, which Python is for SIGTERM, would not get it.
exec podman run --rm --pull=never --init --network host --ipc host --read-only --tmpfs /tmp \
  --env 'SLURM_*' --env 'MASTER_*' --env RANK --env WORLD_SIZE --env LOCAL_RANK --env LOCAL_WORLD_SIZE \
  --env OMP_NUM_THREADS "${options[@]}" "$IMAGE:$stage" "$@"
