"""Processes in which the stand-in for Transformer Engine (tests/te_standin) takes its place.

The wheel of the release that pyproject.toml pins is pure Python; the stand-in reads signatures from it. It is
downloaded once, with the interpreter's own pip.
"""

import functools
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

_REPOSITORY = Path(__file__).parent.parent
_STANDIN = Path(__file__).parent / "te_standin"


class NoRelease(Exception):
    """The pinned release could not be downloaded."""


def _requirement() -> str:
    """`transformer-engine==...` as the extra `te` has it, without the packages that need a compiler."""
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]
    (pin,) = [line for line in project["optional-dependencies"]["te"] if line.startswith("transformer-engine")]
    return re.sub(r"\[.*\]", "", pin)


@functools.cache
def release() -> Path:
    """The folder into which the wheel of the pinned release is unpacked.

    Raises:
        NoRelease: it is not in .cache, and pip cannot get it.
    """
    requirement = _requirement()
    cache = _REPOSITORY / ".cache" / "transformer-engine"
    folder = cache / requirement.partition("==")[2].replace("*", "x")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    download = subprocess.run([*command, "--dest", cache, requirement], capture_output=True, text=True)
    if download.returncode:
        raise NoRelease(f"pip cannot download {requirement}: {download.stderr.strip().splitlines()[-1:]}")
    newest = max(cache.glob("transformer_engine-*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    unpacked = folder.with_suffix(".unfinished")
    with zipfile.ZipFile(newest) as wheel:
        wheel.extractall(unpacked)
    unpacked.rename(folder)
    return folder


def install() -> None:
    """Put the stand-in in Transformer Engine's place. First thing in a process, before megatron-core is imported."""
    sys.path[:0] = [str(_STANDIN), str(release())]
    # Importing megatron_mm1.parallel readies the process for megatron-core, and hides Transformer Engine where there is
    # no CUDA device. So the module that decides is imported, and told otherwise, before its package runs.
    spec = importlib.util.find_spec("megatron_mm1.parallel")
    assert spec is not None and spec.loader is not None and spec.name not in sys.modules
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    from megatron_mm1.parallel import device

    device.transformer_engine_problem = lambda: None  # type: ignore[assignment]
    spec.loader.exec_module(package)
    from megatron_mm1.model import packed_attention
    from tests.te_standin.varlen import varlen_attn

    packed_attention.varlen_attn = varlen_attn
