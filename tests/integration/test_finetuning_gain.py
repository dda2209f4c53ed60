"""The two examples that learn, from nothing to what fine-tuning was worth: `make finetune` in another folder."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, shell_environment

pytestmark = [pytest.mark.demo, pytest.mark.slow]


def test_fine_tuning_raises_held_out_accuracy_at_both_resolutions(demo_corpus: Path, tmp_path: Path) -> None:
    """Intervals that do not overlap: before and after, own images and others."""
    pretrained, folder = tmp_path / "quickstart", tmp_path / "finetune"
    printed = ""
    for script, arguments in (("quickstart", [pretrained]), ("finetune_quickstart", [pretrained, folder])):
        done = subprocess.run(
            ["bash", str(REPOSITORY / f"examples/{script}.sh"), *map(str, arguments)],
            env=shell_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        printed = done.stdout
    goals = [line for line in printed.splitlines() if " goal >" in line]
    assert len(goals) == 8 and all(line.endswith(" ok") for line in goals)
    for tiling in ("none", "overview_and_crops"):
        assert "demo_questions_exchanged" in (folder / tiling / "report.html").read_text()
