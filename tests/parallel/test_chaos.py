"""A run whose ranks are killed at any moment, and started again, ends as one that nobody disturbed."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.demo
@pytest.mark.parametrize(
    ("kills", "steps", "in_each_place"), [(2, 28, 0), pytest.param(20, 210, 5, marks=pytest.mark.slow)]
)
def test_killed_ranks_change_nothing(demo_corpus, tmp_path, kills, steps, in_each_place):
    """Bit by bit: the loss of every step, the last weights and the optimizer's state.

    The short one dies in saves and in steps too, but how often depends on the machine.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "tests.parallel.chaos", str(tmp_path), "--kills", str(kills), "--steps", str(steps)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert (result["kills"], result["steps"]) == (kills, steps)
    assert min(result["save"], result["step"]) >= in_each_place
    assert result["differences"] == []
    assert (
        len(re.findall("^mm1: rank . .* died at step ", (tmp_path / "disturbed.txt").read_text(), re.MULTILINE))
        == kills
    )
