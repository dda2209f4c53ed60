"""The package as a user gets it: what is built, declared and locked, and which Python `make venv` picks."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_mm1

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
)

TOP_LEVEL = {
    *("megatron_mm1", "examples", "tools", "tests", "benchmarks", "docs"),
    *("setup.py", "pyproject.toml", "requirements.lock", "Makefile", "Dockerfile"),
    *("README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CONTRIBUTING.md"),
}
# Declared though the package does not import them itself.
INDIRECT = {
    "einops": "megatron-core imports it",
    "protobuf": "sentencepiece's model_pb2 imports it",
    "psutil": "megatron-core's checkpoint writers import it",
    "tensorboard": "torch.utils.tensorboard imports it",
}
# Written into folders that transformers loads; the package itself does not import it.
EXPORTED_CODE = ROOT / "megatron_mm1" / "checkpoint" / "transformers_export" / "files"
# Imported where present, and not a requirement.
OPTIONAL = {"wandb", "transformer-engine", "apex"}


def declared(*extras: str) -> list[Requirement]:
    optional = (text for extra in extras for text in PROJECT["optional-dependencies"][extra])
    return [Requirement(text) for text in (*PROJECT["dependencies"], *optional)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """What `pip install .` would install, built from a copy so that the tree stays clean."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megatron_mm1", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(output), str(source)], check=True)
    return zipfile.ZipFile(next(output.glob("*.whl")))


def test_wheel_has_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path.relative_to(ROOT) for path in (ROOT / "megatron_mm1").rglob("*") if path.is_file())
    assert packed == {file.as_posix() for file in files if "__pycache__" not in file.parts}


def test_wheel_declares_version_license_and_command(wheel: zipfile.ZipFile) -> None:
    info = f"megatron_mm1-{megatron_mm1.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {megatron_mm1.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.12\n" in metadata
    assert "mm1 = megatron_mm1.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_what_the_package_imports_is_what_it_declares() -> None:
    imported: set[str] = set()
    for path in (ROOT / "megatron_mm1").rglob("*.py"):
        if path.parent == EXPORTED_CODE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "megatron_mm1"}
    # "nvidia" is shared by many distributions; of those, DALI is the one whose modules the package names.
    owners = {**importlib.metadata.packages_distributions(), "nvidia": ["nvidia-dali-cuda130"]}
    used = {canonicalize_name(owners.get(module, [module])[0]) for module in imported} - OPTIONAL
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    assert used - names == set(), "imported, not declared"
    assert names - used - set(INDIRECT) == set(), "declared, not imported"


@pytest.mark.parametrize("requirement", declared("eval", "dev"), ids=lambda requirement: requirement.name)
def test_lock_satisfies_the_requirement(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", ["cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"])
def test_lock_leaves_cuda_libraries_to_torch(name: str) -> None:
    assert name not in PINS


def test_lock_is_closed() -> None:
    """Everything that a locked package requires is locked too, but for torch's CUDA libraries."""
    as_locked = (name for name, pin in PINS.items() if importlib.metadata.version(name).split("+")[0] == pin)
    missing = {
        (name, canonicalize_name(requirement.name))
        for name in as_locked
        for requirement in map(Requirement, importlib.metadata.requires(name) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) not in PINS
    }
    assert {name for name, _ in missing} <= {"torch"}, missing
    assert all(re.match(r"nvidia-|cuda-|triton", requirement) for _, requirement in missing), missing


def test_top_level_holds_only_what_is_agreed() -> None:
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines()
    found = {file.split("/")[0] for file in files}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def fake_python(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


FAILING_SHIM = ('echo "python3.12: command not found" >&2', "exit 127")
SEES_NO_VENV = ('case "$2" in *ensurepip*) exit 1 ;; esac', "echo 3.12.4")


def version(text: str) -> str:
    return f"echo {text}"


def print_python(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`tools/bootstrap.sh --print-python` where only folder/path is on PATH and folder is home."""
    (folder / "path").mkdir(exist_ok=True)
    (folder / "path" / "dirname").symlink_to(shutil.which("dirname") or "")
    command = [shutil.which("bash") or "bash", str(ROOT / "tools" / "bootstrap.sh"), "--print-python"]
    environment = {"PATH": str(folder / "path"), "HOME": str(folder), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_bootstrap_skips_a_shim_that_fails_and_takes_the_version_managers_python(tmp_path: Path) -> None:
    fake_python(tmp_path / "path" / "python3.12", *FAILING_SHIM)
    fake_python(tmp_path / "path" / "python3", version("3.11.7"))
    managed = fake_python(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python", version("3.12.1"))
    assert print_python(tmp_path).stdout.strip() == str(managed)


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        (("3.14.0", "3.13.2", "3.12.9"), "3.12.9"),
        (("3.14.0", "3.13.2", "3.11.1"), "3.13.2"),
        (("3.14.0", "3.9.1"), "3.14.0"),
    ],
)
def test_bootstrap_prefers_the_tested_python(tmp_path: Path, installed: tuple[str, ...], chosen: str) -> None:
    for number in installed:
        fake_python(tmp_path / ".pyenv" / "versions" / number / "bin" / "python", version(number))
    assert print_python(tmp_path).stdout.strip() == f"{tmp_path}/.pyenv/versions/{chosen}/bin/python"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((version("3.10.13"),), "is Python 3.10.13; megatron_mm1 needs 3.12 or newer"),
        (FAILING_SHIM, "does not run as a Python"),
        (SEES_NO_VENV, "apt-get install python3.12-venv"),
    ],
    ids=["old", "failing shim", "no venv module"],
)
def test_bootstrap_refuses_a_given_python_that_cannot_do(tmp_path: Path, lines: tuple[str, ...], says: str) -> None:
    given = fake_python(tmp_path / "given", *lines)
    fake_python(tmp_path / "path" / "python3.12", version("3.12.1"))
    result = print_python(tmp_path, PYTHON=str(given))
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr


def test_bootstrap_says_how_to_get_a_python_when_there_is_none(tmp_path: Path) -> None:
    if any(Path("/opt").glob("python*")) or os.path.exists("/opt/conda"):
        pytest.skip("this machine has a Python under /opt, where bootstrap looks too")
    old = fake_python(tmp_path / "path" / "python3", version("3.11.2"))
    result = print_python(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{old}: 3.11.2" in result.stderr
    assert "uv python install 3.12" in result.stderr
