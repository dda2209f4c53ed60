"""The benchmark of the two modes of vision work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm1.config.validation import validate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import vision_modes


def test_the_slower_rank_counts_and_the_median_of_the_ratios():
    """(tensor, data) seconds of three pairs of steps on two ranks."""
    pairs = vision_modes.slowest_rank([[(2.0, 1.0), (3.0, 4.0), (9.0, 1.0)], [(1.0, 2.0), (8.0, 1.0), (9.0, 2.0)]])
    assert pairs == [(2.0, 2.0), (8.0, 4.0), (9.0, 2.0)]
    assert vision_modes.median_ratio(pairs) == 2.0


def test_the_towers_are_legal_and_of_two_sizes():
    sizes = []
    for config in vision_modes.towers().values():
        validate(config, world_size=vision_modes.PROCESSES)
        sizes.append((config.model.vision.hidden_size, config.model.vision.image_size))
    assert sizes == [(128, 48), (256, 96)]


@pytest.mark.parametrize("options", [["--pairs", "9"], ["--images", "0"]])
def test_too_little_to_say_anything_is_refused(options):
    with pytest.raises(SystemExit, match="2"):
        vision_modes.main(options)


@pytest.mark.slow
def test_both_modes_compute_the_same_and_are_timed():
    command = [sys.executable, vision_modes.__file__, "--pairs", "10", "--warm-up", "1", "--images", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stderr  # which is faster depends on the machine
    lines = done.stdout.splitlines()
    goals = [line for line in lines if line.startswith("tensor_over_data_")]
    assert [line.split()[0].removeprefix("tensor_over_data_") for line in goals] == ["mm1-tiny", "4x256_at_96px"]
    assert all("x goal >1 " in line for line in goals)
    assert sum("tokens and gradients agree to" in line for line in lines) == 2
