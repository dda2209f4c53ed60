"""The command line of benchmarks/finetuning_gain.py."""

import importlib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def test_runs_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The goals of one would take the place of the other's."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    gain = importlib.import_module("finetuning_gain")
    assert gain.main(["a/none", "b/none", "b/crops"]) == 2
    assert "several runs are called none: rename their folders" in capsys.readouterr().err
    assert gain.distinct_names([Path("a/none"), Path("a/crops/")]) == ["none", "crops"]
