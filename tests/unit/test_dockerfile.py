"""Dockerfile and .dockerignore agree with each other and with pyproject.toml; `make container-test` builds them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORE = (ROOT / ".dockerignore").read_text().splitlines()
ALLOWED = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}


def copied_from_the_context() -> set[str]:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {source for copy in copies for source in copy.split()} - {"."}


def test_the_context_is_an_allow_list_of_what_exists() -> None:
    """Credentials, runs and caches that lie in a checkout are never sent to an engine."""
    assert IGNORE[0] == "*"
    assert [name for name in sorted(ALLOWED) if not (ROOT / name).exists()] == []


def test_all_that_is_copied_is_in_the_context() -> None:
    assert {source.partition("/")[0] for source in copied_from_the_context()} <= ALLOWED


def argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(.+)$", DOCKERFILE, re.MULTILINE)
    return value


def test_what_is_compiled_is_pinned() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", argument("APEX_REVISION"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (engine,) = map(Requirement, project["optional-dependencies"]["te"])
    assert Version(argument("TRANSFORMER_ENGINE")) in engine.specifier


@pytest.mark.parametrize("stage", ["runtime", "test"])
def test_a_stage_ends_as_a_user_who_is_not_root(stage: str) -> None:
    (body,) = re.findall(rf"^FROM \S+ AS {stage}$(.+?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^USER (\S+)$", body, re.MULTILINE)[-1] == "10001"
