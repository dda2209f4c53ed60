"""A run killed with SIGKILL at any moment of a save leaves a checkpoint that loads, and is what was saved."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path, kills):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.parallel.killed_saves", str(tmp_path), "--kills", str(kills)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["kills"] >= kills and result["between_first_byte_and_latest"] >= 2 * kills / 3
    assert result["last_iteration"] >= 2
