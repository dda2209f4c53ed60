"""Adapters in parallel layouts: the same gradients, updates and initial weights as in one process."""

from functools import cache

import pytest

from megatron_mm1.parity.harness import Comparison, parity_config
from megatron_mm1.parity.layouts import Layout, choose_layouts
from tests.parallel.test_parity import SMALL

LORA = ["--model.lora.rank", "4", "--model.lora.alpha", "12"]
TOWER = ["--model.lora.tower_targets", "[linear_qkv, linear_proj, linear_fc1, linear_fc2]"]
EXPERTS = ["--model.lora.decoder_targets", "[linear_qkv, linear_proj]"]
CONFIGS = {
    "dense": parity_config(["--preset", "mm1-tiny", *SMALL, *LORA, *TOWER]),
    "decoder": parity_config(["--preset", "mm1-tiny", *SMALL, *LORA, "--freeze", "[tower, connector]"]),
    "experts": parity_config(["--preset", "mm1-tiny-moe", *SMALL, *LORA, *EXPERTS]),
}
CASES = {
    "dense": (
        "TP2",
        "TP2+SP",
        "TP2+SP images shared",
        "PP2",
        "CP2 images shared",
        "DP2 distributed optimizer",
        "TP2+SP full recomputation",
        "TP2+SP images shared tower recomputed",
        "PP2 tied output",
    ),
    "decoder": ("PP2", "TP2+SP full recomputation"),
    "experts": ("TP2+SP EP2", "EP2 DP2"),
}


@cache
def layouts(name: str) -> dict[str, Layout]:
    return {layout.name.replace(",", ""): layout for layout in choose_layouts(CONFIGS[name], "all", max_world_size=2)}


@pytest.fixture(scope="module")
def comparisons():
    started = {name: Comparison(config, kinds=["mixed"]) for name, config in CONFIGS.items()}
    yield started
    for comparison in started.values():
        comparison.__exit__()


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, chosen in CASES.items() for layout in chosen])
def test_every_layout_trains_adapters_as_one_process_does(comparisons, pool, name, layout):
    result = comparisons[name].compare(layouts(name)[layout], pool(2))
    assert result.failure is None, result.failure
    assert result.passed, result.row()
