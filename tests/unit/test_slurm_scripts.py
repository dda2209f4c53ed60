"""The layouts of the shipped Slurm scripts are ones that the configuration allows on the GPUs they ask for."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_mm1.config.loading import load_config
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError
from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "examples" / "slurm").glob("pretrain_*.sh"))


def gpus(script: Path) -> int:
    nodes, per_node = (
        int(re.search(rf"^#SBATCH --{option}=(\d+)$", script.read_text(), re.MULTILINE)[1])
        for option in ("nodes", "gpus-per-node")
    )
    return nodes * per_node


def options(script: Path) -> list[str]:
    """Of `mm1 train`, but for those that a site and a user add."""
    command = re.search(r"^train (.*)", script.read_text(), re.MULTILINE | re.DOTALL)[1]
    return [word for word in shlex.split(command.replace("\\\n", " ")) if not word.startswith("$")]


def test_every_large_preset_has_a_script():
    assert {load_config(options(script)).name for script in SCRIPTS} == {
        *("mm1-3b", "mm1-7b", "mm1-30b", "mm1-3b-moe", "mm1-7b-moe")
    }


@pytest.mark.parametrize("recipe", ["bf16", "fp8_tensorwise"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_layout_is_legal(script, recipe):
    config = load_config([*options(script), "--fp8.decoder_recipe", recipe])
    validate(config, world_size=gpus(script))
    with pytest.raises(ConfigError):
        validate(config, world_size=gpus(script) - 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_tensor_and_expert_parallel_ranks_share_a_node(script):
    parallel = load_config(options(script)).parallel
    assert 8 % parallel.tensor_model_parallel_size == 0
    assert 8 % (parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size) == 0
