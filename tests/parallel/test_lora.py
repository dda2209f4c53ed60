"""Adapters in parallel layouts: the same gradients, updates and initial weights as in one process."""

from functools import cache

import pytest

from megatron_mm1.config import MM1Config
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError
from megatron_mm1.model import lora, mm1
from megatron_mm1.parity import jobs
from megatron_mm1.parity.harness import Comparison, parity_config
from megatron_mm1.parity.layouts import Layout, choose_layouts
from tests.parallel.broken import replaced
from tests.parallel.test_parity import FAST_WORLD_SIZE, SMALL, assert_equal, layouts

LORA = ["--model.lora.rank", "4", "--model.lora.alpha", "12"]
TOWER = ["--model.lora.tower_targets", "[linear_qkv, linear_proj, linear_fc1, linear_fc2]"]
EXPERTS = ["--model.lora.decoder_targets", "[linear_qkv, linear_proj]"]
CONFIGS = {
    "dense": parity_config(["--preset", "mm1-tiny", *SMALL, *LORA, *TOWER]),
    "decoder": parity_config(["--preset", "mm1-tiny", *SMALL, *LORA, "--freeze", "[tower, connector]"]),
    "experts": parity_config(["--preset", "mm1-tiny-moe", *SMALL, *LORA, *EXPERTS]),
}
CASES = {
    "dense": ("TP2", "TP2+SP", "TP2+SP images shared", "PP2", "PP2 VPP2", "DP2 distributed optimizer", "TP2+SP PP2"),
    "decoder": ("PP2", "TP2+SP full recomputation"),
    "experts": ("TP2+SP EP2", "EP2 DP2"),
}
SLOW_CASES = {
    "dense": ("CP2 images shared", "TP2 CP2", "TP2+SP CP2"),
    "decoder": ("PP2 VPP2", "PP2 tied output"),
    "experts": ("TP2+SP PP2",),
}
TABLE = {"dense": "mm1-tiny", "experts": "mm1-tiny-moe"}
"""Models in tests/parallel/test_parity.py whose layouts are those of a configuration here, all of them slow."""


@cache
def named_layouts(name: str) -> dict[str, Layout]:
    chosen = choose_layouts(CONFIGS[name], "all", max_world_size=FAST_WORLD_SIZE)
    return {layout.name.replace(",", ""): layout for layout in chosen}


def is_legal(config: MM1Config, layout: Layout) -> bool:
    """Not where the layout freezes what has adapters."""
    try:
        validate(layout.configure(config), world_size=layout.world_size)
    except ConfigError:
        return False
    return True


def table() -> list[tuple[str, Layout]]:
    """The parity table's layouts that are legal with adapters, few processes first."""
    return [
        (name, layout)
        for model, layout in layouts("pairs")
        for name in TABLE
        if TABLE[name] == model and is_legal(CONFIGS[name], layout)
    ]


@pytest.fixture(scope="module")
def comparisons():
    started = {name: Comparison(config, kinds=["mixed"]) for name, config in CONFIGS.items()}
    yield started
    for comparison in started.values():
        comparison.__exit__()


def parameters(cases, **kwargs):
    return [pytest.param(name, layout, **kwargs) for name, chosen in cases.items() for layout in chosen]


@pytest.mark.parametrize(("name", "layout"), [*parameters(CASES), *parameters(SLOW_CASES, marks=[pytest.mark.slow])])
def test_a_layout_trains_adapters_as_one_process_does(comparisons, pool, name, layout):
    assert_equal(comparisons[name], named_layouts(name)[layout], pool, ["mixed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(name, layout, id=f"{name}: {layout.name}") for name, layout in table()]
)
def test_the_parity_tables_layouts_do_too(comparisons, pool, name, layout):
    assert_equal(comparisons[name], layout, pool, ["mixed"])


def test_the_table_holds_every_kind_of_layout():
    legal = [layout.values() for _, layout in table()]
    assert len(legal) >= 60
    for pair in (("TP", "PP"), ("TP", "CP"), ("PP", "CP"), ("VPP", "TP"), ("EP", "TP"), ("EP", "PP"), ("EP", "ETP")):
        assert any(all(sizes[dimension] > 1 for dimension in pair) for sizes in legal), pair


def gradients_not_summed_over_the_sequence(*args, **kwargs):
    def wrong(right):
        def init(self, *arguments, **options):
            right(self, *arguments, **options)
            self.lora_A.sequence_parallel = self.lora_B.sequence_parallel = False

        return init

    with replaced(lora.LoraLinear, "__init__", wrong):
        return jobs.run_layout(*args, **kwargs)


def gradients_not_summed_over_the_rows_of_b(*args, **kwargs):
    with replaced(lora, "copy_to_tensor_model_parallel_region", lambda right: lambda low, group: low):
        return jobs.run_layout(*args, **kwargs)


def products_not_summed_over_the_columns_of_a(*args, **kwargs):
    with replaced(lora, "reduce_from_tensor_model_parallel_region", lambda right: lambda low, group: low):
        return jobs.run_layout(*args, **kwargs)


def repeated(low, group):
    return low.repeat(group.size(), *[1] * (low.dim() - 1))


def own_positions(low, group):
    return low.chunk(group.size())[group.rank()]


def sequence_kept_apart(*args, **kwargs):
    """Each rank's own positions in the place of all."""
    with replaced(lora, "gather_from_sequence_parallel_region", lambda right: repeated):
        return jobs.run_layout(*args, **kwargs)


def products_scattered_but_not_summed(*args, **kwargs):
    with replaced(lora, "reduce_scatter_to_sequence_parallel_region", lambda right: own_positions):
        return jobs.run_layout(*args, **kwargs)


def gate_and_up_split_as_one(*args, **kwargs):
    with replaced(lora, "apply_swiglu_sharded_factory", lambda right: lambda entry, offsets: entry):
        return jobs.run_layout(*args, **kwargs)


def input_without_gradient(*args, **kwargs):
    with replaced(mm1, "with_gradient", lambda right: lambda features: features):
        return jobs.run_layout(*args, **kwargs)


RULES = {
    gradients_not_summed_over_the_sequence: ("dense", "TP2+SP"),
    gradients_not_summed_over_the_rows_of_b: ("dense", "TP2"),
    products_not_summed_over_the_columns_of_a: ("dense", "TP2"),
    sequence_kept_apart: ("dense", "TP2+SP"),
    products_scattered_but_not_summed: ("dense", "TP2+SP"),
    gate_and_up_split_as_one: ("dense", "TP2"),
    input_without_gradient: ("decoder", "TP2+SP full recomputation"),
}
"""By job: the configuration and the layout that must show it."""


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.replace("_", " "))
def test_a_broken_rule_is_noticed(comparisons, pool, rule):
    name, layout = RULES[rule]
    comparison = comparisons[name]
    comparison.job, right = rule, comparison.job
    try:
        result = comparison.compare(named_layouts(name)[layout], pool(2))
    finally:
        comparison.job = right
    assert result.failure is None, result.failure
    assert not result.passed
