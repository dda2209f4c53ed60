# shellcheck shell=bash
# Sourced by the scripts beside it: buildah and podman, with all that they keep in one folder.
#
# Variables: STATE  that folder (.cache/container)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
STATE=${STATE:-$repository/.cache/container}
mkdir -p "$STATE/tmp" "$STATE/home"
STATE=$(cd "$STATE" && pwd -P)
# shellcheck disable=SC2034  # for the scripts
IMAGE=localhost/megatron_mm1

export TMPDIR=$STATE/tmp HOME=$STATE/home XDG_RUNTIME_DIR=$STATE/home
export CONTAINERS_STORAGE_CONF=$STATE/storage.conf CONTAINERS_CONF=$STATE/containers.conf
export BUILDAH_ISOLATION=chroot # needs neither systemd nor a network of its own
unset STORAGE_DRIVER

die() {
  printf 'container: %s\n' "$@" >&2
  exit 2
}

write_settings() {
  local open_files
  open_files=$(ulimit -Hn)
  cat >"$CONTAINERS_STORAGE_CONF" <<END
[storage]
driver = "overlay"
graphroot = "$STATE/storage"
runroot = "$STATE/run"
END
  # Limits of this shell: podman's own are higher, and raising one takes a capability that a container may lack.
  # runc, since Debian 12's crun refuses a machine that has both versions of control groups.
  cat >"$CONTAINERS_CONF" <<END
[containers]
default_ulimits = ["nofile=$open_files:$open_files", "nproc=16384:16384"]
netns = "host"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
static_dir = "$STATE/libpod"
tmp_dir = "$STATE/run/libpod"
volume_path = "$STATE/volumes"
END
}

install_tools() {
  local tool missing=()
  for tool in buildah catatonit mmdebstrap podman runc; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  ((${#missing[@]} > 0)) || return 0
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    die "needs ${missing[*]}: as root on Debian, apt-get install --no-install-recommends ${missing[*]}"
  fi
  echo "container: installing ${missing[*]} with apt-get" >&2
  apt-get update -qq || echo "container: apt-get update failed; going on with the package lists that are here" >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$STATE/apt.log" 2>&1 ||
    die "apt-get install ${missing[*]} failed; what it said is in $STATE/apt.log"
}

mounts_left() { # what is still mounted below the folder, the innermost first
  awk -v state="$STATE/" 'index($2, state) == 1 { print $2 }' /proc/self/mounts | sort -r
}

unmount_all() {
  local mount
  while read -r mount; do
    umount "$mount"
  done < <(mounts_left)
}
