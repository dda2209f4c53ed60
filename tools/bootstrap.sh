#!/usr/bin/env bash
# Makes the virtual environment: finds a Python >= 3.12 that really runs, installs requirements.lock and this package
# (editable). Does nothing when what is there is up to date.
#
# usage: tools/bootstrap.sh                 the locked environment, in .venv
#        tools/bootstrap.sh --newest-torch  the lock with the newest torch and torchvision instead, in .venv-newest
#        tools/bootstrap.sh --print-python  only say which Python would be used
#
# Variables: PYTHON       the interpreter to use
#            VENV         where the environment goes
#            TORCH_INDEX  a package index for torch and torchvision alone, such as a CPU build's; remembered in the
#                         environment. Everything else follows pip's own settings (PIP_INDEX_URL, pip.conf).
set -euo pipefail
shopt -s nullglob

mode=${1:-}
case $mode in
  "" | --print-python) VENV=${VENV:-.venv} ;;
  --newest-torch) VENV=${VENV:-.venv-newest} ;;
  *) echo "bootstrap: unknown argument $mode (want --newest-torch or --print-python)" >&2 && exit 2 ;;
esac

die() {
  printf 'bootstrap: %s\n' "$@" >&2
  exit 2
}

version_of() { # PYTHON -> its version; fails where it does not run, as a version manager's shim of another version
  local version
  version=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null) || return 1
  [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] && echo "$version"
}

rank() { # VERSION -> 0 is the tested one; 2 has no wheel of megatron-core; fails for what is too old
  case $1 in
    3.12.*) echo 0 ;;
    3.13.*) echo 1 ;;
    3.1[4-9].* | 3.[2-9][0-9].*) echo 2 ;;
    *) return 1 ;;
  esac
}

has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; }

candidates() { # every place a Python may be, one a line
  local name
  for name in python3.12 python3.13 python3.14 python3 python; do
    type -aP "$name" || true
  done
  local home=${HOME:-/nonexistent}
  local manager=(
    "${PYENV_ROOT:-$home/.pyenv}"/versions/*/bin/python
    "${UV_PYTHON_INSTALL_DIR:-$home/.local/share/uv/python}"/*/bin/python3
    "${ASDF_DATA_DIR:-$home/.asdf}"/installs/python/*/bin/python
    "${MISE_DATA_DIR:-$home/.local/share/mise}"/installs/python/*/bin/python
    "$home"/{miniconda3,anaconda3,miniforge3,mambaforge,.conda}/{bin,envs/*/bin}/python
    /opt/conda/{bin,envs/*/bin}/python
    /opt/python*/{bin,*/bin}/python3
  )
  ((${#manager[@]} == 0)) || printf '%s\n' "${manager[@]}"
}

given_python() {
  local version
  version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not run as a Python."
  rank "$version" >/dev/null || die "PYTHON=$PYTHON is Python $version; megatron_mm1 needs 3.12 or newer (3.12 is tested)."
  has_venv "$PYTHON" || die "PYTHON=$PYTHON lacks venv or ensurepip (on Debian: apt-get install python${version%.*}-venv)."
  echo "$PYTHON"
}

find_python() {
  local python version order best="" best_version="" best_order=9 seen=""
  while read -r python; do
    [[ $python != "$venv_path"/* ]] || continue
    version=$(version_of "$python") || continue
    order=$(rank "$version") || order=9
    has_venv "$python" || version+=" (without venv or ensurepip)" order=9
    seen+="  $python: $version"$'\n'
    if ((order < best_order)); then
      best=$python best_version=$version best_order=$order
    fi
    ((best_order > 0)) || break
  done < <(candidates)
  [[ -n $best ]] || die "found no Python >= 3.12 with venv and ensurepip. Looked at:" "${seen:-  none that runs}" \
    "Get one, then run this again (or name it with PYTHON=/path/to/python3.12):" \
    "  apt-get install python3.12 python3.12-venv   (Ubuntu 24.04; Debian 12 has no package of it)" \
    "  uv python install 3.12" \
    "  pyenv install 3.12"
  if ((best_order == 2)); then
    echo "bootstrap: found only Python $best_version, for which megatron-core has no wheel (3.12 is tested)" >&2
  fi
  echo "$best"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv_path=$VENV
[[ $VENV == /* ]] || venv_path=$(pwd -P)/$VENV
if [[ $mode == --print-python ]]; then
  if [[ -n ${PYTHON:-} ]]; then given_python; else find_python; fi
  exit
fi

[[ ! -d $VENV || -e $VENV/pyvenv.cfg ]] || die "$VENV exists and is no virtual environment; move it or set VENV."
venv_python=$VENV/bin/python
stamp=$VENV/.stamp-$(cat requirements.lock pyproject.toml setup.py | sha256sum | cut -c 1-16)
torch_index_file=$VENV/.torch-index
torch_index=$(cat "$torch_index_file" 2>/dev/null || true)

usable() { # the environment that is there runs, was made at this place, and is of the Python and torch index asked for
  local version
  version=$(version_of "$venv_python") && rank "$version" >/dev/null || return 1
  grep -qF "$venv_path" "$VENV/bin/activate" || return 1
  [[ -z ${TORCH_INDEX:-} || $TORCH_INDEX == "$torch_index" ]] || return 1
  [[ -z ${PYTHON:-} ]] || [[ $version == "$(version_of "$(given_python)")" ]]
}

# Checked on its own: a `die` inside `usable` would only end its subshell.
if [[ -n ${PYTHON:-} ]]; then given_python >/dev/null; fi

if usable; then
  if [[ -e $stamp && $mode != --newest-torch ]]; then exit 0; fi
else
  if [[ -n ${PYTHON:-} ]]; then python=$PYTHON; else python=$(find_python); fi
  torch_index=${TORCH_INDEX:-$torch_index}
  echo "bootstrap: making $VENV with $python ($(version_of "$python"))"
  "$python" -m venv --clear "$VENV"
fi
rm -f "$VENV"/.stamp-*

echo "bootstrap: installing into $VENV (minutes the first time; details in $VENV/pip.log)"
install() {
  "$venv_python" -m pip --disable-pip-version-check install --progress-bar off "$@" >>"$VENV/pip.log" 2>&1 && return
  tail -n 20 "$VENV/pip.log" >&2
  echo "bootstrap: pip install $* failed; the whole of what it said is in $VENV/pip.log" >&2
  exit 1
}
mapfile -t torch_pins < <(grep -E '^(torch|torchvision)==' requirements.lock)
if [[ $mode == --newest-torch ]]; then
  grep -vE '^(torch|torchvision)==' requirements.lock >"$VENV/without-torch.txt"
  install --no-deps --upgrade ${torch_index:+--index-url "$torch_index"} torch torchvision
  install -r "$VENV/without-torch.txt" torch torchvision
else
  [[ -z $torch_index ]] || install --no-deps --index-url "$torch_index" "${torch_pins[@]}"
  install -r requirements.lock
fi
echo "$torch_index" >"$torch_index_file"
install --no-deps --no-build-isolation --editable .
touch "$stamp"
"$venv_python" -c 'import sys, torch; print(f"bootstrap: ready, Python {sys.version.split()[0]}, torch {torch.__version__}")'
