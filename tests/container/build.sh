#!/usr/bin/env bash
# Builds the Dockerfile's stages `runtime` and `test` without an image registry, a Docker engine, systemd or a GPU:
# under the name in FROM stands Debian with Python and the locked torch, and what needs CUDA's compiler is left out.
# What is built is kept in the state folder; a second run builds what has changed.
#
# usage: tests/container/build.sh
#
# Variables: STATE        where everything is kept (.cache/container)
#            TORCH_INDEX  a further package index for torch, such as a CPU build's: 0.7 GB in place of 5 GB
#            pip's own settings of package indices and certificates are used, and stay out of the image
set -euo pipefail
# shellcheck source=tests/container/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
go_apart "$@"
cd "$repository"

NEEDED_GB=22 # 20.5 at the peak, while the layer with torch is written; afterwards 7 stay

exec 9>"$STATE/lock"
flock -n 9 || die "another build is using $STATE"

base=$(sed -n 's/^ARG BASE=//p' Dockerfile)

pip_setting() { # NAME as in pip.conf -> its value, of a variable or a file
  local variable=PIP_${1^^}
  variable=${variable//-/_}
  echo "${!variable:-$(HOME=$CALLER_HOME python3 -m pip config get "global.$1" 2>/dev/null || true)}"
}

write_pip_settings() { # for the build alone: package indices on the network, and where the certificates lie there
  local name url urls
  echo "[global]"
  echo "cert = /etc/ssl/certs/ca-certificates.crt"
  for name in index-url extra-index-url; do
    urls=""
    for url in $(pip_setting "$name"); do
      [[ $url != http* ]] || urls+=" $url"
    done
    [[ -z $urls ]] || echo "$name =$urls"
  done
}

write_pip_settings >"$STATE/pip.conf"
certificates=$(pip_setting cert)
certificates=${certificates:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
[[ -r $certificates ]] || die "no certificates at $certificates (apt-get install ca-certificates)"
mounts=(
  --volume "$(realpath "$certificates"):/etc/ssl/certs/ca-certificates.crt:ro"
  --volume "$STATE/pip.conf:/etc/pip.conf:ro"
)

build() { # NAME ARGUMENT..
  local name=$1 start=$SECONDS
  shift
  echo "container: building $name (details in $STATE/build.log)"
  if ! buildah build --pull-never --layers --force-rm "${mounts[@]}" --tag "$name" "$@" >>"$STATE/build.log" 2>&1; then
    tail -n 30 "$STATE/build.log" >&2
    die "the build of $name failed; the whole of what it said is in $STATE/build.log"
  fi
  echo "container: built $name in $((SECONDS - start)) s"
}

check_disk() {
  local free
  free=$(df --output=avail -BG "$STATE" | tail -n 1 | tr -dc 0-9)
  ((free >= NEEDED_GB)) || die "$free GB are free in $STATE; a first build needs $NEEDED_GB GB." \
    "Make room, set STATE to a folder elsewhere, or TORCH_INDEX to an index with a CPU build of torch."
}

make_debian() { # pip.conf is there, empty, so that mounting ours over it leaves no trace in a layer
  local start=$SECONDS
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv \
    --customize-hook="touch \"\$1/etc/pip.conf\"" trixie "$STATE/tmp/debian.tar" >>"$STATE/build.log" 2>&1 ||
    die "mmdebstrap could not make a Debian; what it said is in $STATE/build.log"
  mv "$STATE/tmp/debian.tar" "$STATE/standin"
  echo "container: made a Debian in $((SECONDS - start)) s"
}

make_base() {
  {
    [[ -z ${TORCH_INDEX:-} ]] || echo "--extra-index-url $TORCH_INDEX"
    grep -E '^(packaging|torch|torchvision)==' requirements.lock
  } >"$STATE/standin/torch.txt"
  build "$base" --file tests/container/standin.Dockerfile "$STATE/standin"
}

: >"$STATE/build.log"
buildah rm --all >/dev/null # of scripts that were killed
buildah inspect --type image "$base" >/dev/null 2>&1 || check_disk
[[ -s $STATE/standin/debian.tar ]] || make_debian
make_base
for stage in runtime test; do
  build "$IMAGE:$stage" --target "$stage" --build-arg APEX_REVISION= --build-arg TRANSFORMER_ENGINE= .
done
buildah rmi --prune >/dev/null # layers that no image has any more
