#!/usr/bin/env bash
# Runs a command in the image that build.sh has built, as the image's user. What it writes into the image is gone
# afterwards. Ranks of srun and torchrun find their variables, and the network is the machine's.
#
# usage: tests/container/run.sh [--stage runtime|test] [BUILDAH_RUN_OPTION..] -- COMMAND..
#   tests/container/run.sh -- mm1 doctor
#   srun --kill-on-bad-exit tests/container/run.sh --volume "$PWD/runs:/workspace/megatron_mm1/runs" -- mm1 train ...
#
# Variables: STATE  where build.sh has put the image (.cache/container)
set -euo pipefail
# shellcheck source=tests/container/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
go_apart "$@"

stage=runtime options=()
while (($# > 0)) && [[ $1 != -- ]]; do
  case $1 in
    --stage) stage=$2 && shift 2 ;;
    *) options+=("$1") && shift ;;
  esac
done
(($# > 1)) || die "no command: run.sh [OPTION..] -- COMMAND.."
shift

for name in $(compgen -e); do
  case $name in
    SLURM_* | MASTER_* | RANK | WORLD_SIZE | LOCAL_RANK | LOCAL_WORLD_SIZE | OMP_NUM_THREADS)
      options+=(--env "$name=${!name}")
      ;;
  esac
done

container=$(buildah from --pull-never "$IMAGE:$stage")
trap 'buildah rm "$container" >/dev/null' EXIT
buildah run "${options[@]}" "$container" -- "$@"
