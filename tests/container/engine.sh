# shellcheck shell=bash
# Sourced by the scripts beside it: buildah, which builds images and runs them without a service, kept to one folder.
#
# Variables: STATE  that folder (.cache/container)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
STATE=${STATE:-$repository/.cache/container}
mkdir -p "$STATE"/{home,outside,standin,tmp}
STATE=$(cd "$STATE" && pwd -P)
# shellcheck disable=SC2034  # for the scripts
IMAGE=localhost/megatron_mm1

export CALLER_HOME=${CALLER_HOME:-$HOME} # where pip's settings may lie
export STATE TMPDIR=$STATE/tmp HOME=$STATE/home
export CONTAINERS_STORAGE_CONF=$STATE/storage.conf CONTAINERS_CONF=$STATE/containers.conf
export BUILDAH_ISOLATION=chroot # needs neither a runtime, systemd nor control groups; the network is the machine's
unset STORAGE_DRIVER XDG_RUNTIME_DIR

die() {
  printf 'container: %s\n' "$@" >&2
  exit 2
}

is_apart() { [[ ${CONTAINER_APART:-} == "$STATE" ]]; }

# Runs a command in namespaces of its own: mounts end with it, and so do processes, however it ends. What buildah writes
# outside of the folder, to /run and /var/lib, goes to memory.
run_apart() { # COMMAND..
  local status=0
  # shellcheck disable=SC2016  # for the shell inside
  CONTAINER_APART=$STATE unshare --mount --pid --fork --kill-child --mount-proc --propagation private bash -euc '
    mount -t tmpfs tmpfs "$STATE/outside"
    for folder in run var/lib; do
      mkdir -p "$STATE/outside/$folder/"{new,work}
      mount -t overlay -o "lowerdir=/$folder,upperdir=$STATE/outside/$folder/new,workdir=$STATE/outside/$folder/work" \
        overlay "/$folder"
    done
    "$@"' apart "$@" &
  # shellcheck disable=SC2064  # the process is known now
  trap "kill -KILL $!" EXIT
  wait "$!" || status=$?
  trap - EXIT
  return "$status"
}

# Goes on apart, with all that buildah needs.
go_apart() { # THE SCRIPT'S ARGUMENTS..
  local status=0
  ! is_apart || return 0
  prepare
  run_apart "$0" "$@" || status=$?
  exit "$status"
}

prepare() {
  [[ $(id -u) == 0 ]] || die "needs root: buildah mounts layers"
  install_tools
  write_settings
}

install_tools() {
  local tool missing=()
  for tool in buildah mmdebstrap; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  ((${#missing[@]} > 0)) || return 0
  command -v apt-get >/dev/null || die "needs ${missing[*]}, and this is no Debian: install them"
  echo "container: installing ${missing[*]} with apt-get" >&2
  apt-get update -qq || echo "container: apt-get update failed; going on with the package lists that are here" >&2
  DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$STATE/apt.log" 2>&1 ||
    die "apt-get install ${missing[*]} failed; what it said is in $STATE/apt.log"
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
  # Limits of this shell: buildah's own are higher, and raising one takes a capability that a container may lack.
  cat >"$CONTAINERS_CONF" <<END
[containers]
default_ulimits = ["nofile=$open_files:$open_files", "nproc=16384:16384"]
netns = "host"
[network]
network_config_dir = "$STATE/networks"
END
}
