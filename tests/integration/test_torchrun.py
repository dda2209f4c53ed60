"""`python -m megatron_mm1.torchrun` ends as its workers do."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("ending", "code"),
    [("exit 0", 0), ("exit 2", 2), ("exit 75", 75), ("kill -KILL $BASHPID", 137)],
    ids=lambda x: str(x),
)
def test_exit_code_is_the_workers(ending, code):
    # The second worker would run on, and is ended by torchrun.
    worker = f"if (( LOCAL_RANK == 0 )); then {ending}; elif (( {code} )); then sleep 600; fi"
    torchrun = [sys.executable, "-m", "megatron_mm1.torchrun", "--standalone", "--nproc-per-node=2", "--no-python"]
    result = subprocess.run([*torchrun, "bash", "-c", worker], capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
