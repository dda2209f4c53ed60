"""Kinds of batch in layouts that cover every legal pair of sizes, against one process; and that the comparison
notices when something is wrong.
"""

import json
import zlib
from collections import Counter
from functools import cache

import pytest

from megatron_mm1.parity.batches import KINDS
from megatron_mm1.parity.harness import Comparison, parity_config
from megatron_mm1.parity.layouts import Layout, choose_layouts, covering_layouts, legal_layouts, pairs
from megatron_mm1.parity.report import Bounds, write_report
from tests.parallel import broken

MAX_WORLD_SIZE = 8
FAST_WORLD_SIZE = 4
"""Layouts of more processes are slow: eight of them take turns on two cores."""
SMALL = [
    *("--model.decoder.hidden_size", "64", "--model.decoder.ffn_hidden_size", "160", "--vocab_size", "512"),
    *("--model.vision.hidden_size", "64", "--model.vision.ffn_hidden_size", "128", "--model.vision.num_layers", "2"),
    *("--model.connector.hidden_size", "32", "--seq_length", "128"),
]
"""The presets' structure at a size at which the many layouts take minutes."""
CONFIGS = {
    "mm1-tiny": parity_config(["--preset", "mm1-tiny", *SMALL]),
    "mm1-tiny-moe": parity_config(["--preset", "mm1-tiny-moe", *SMALL, "--output_z_loss_coeff", "0.1"]),
}


@cache
def layouts(choice: str) -> list[tuple[str, Layout]]:
    """(preset, layout), few processes first, so that each pool of workers is started once."""
    chosen = [
        (name, layout)
        for name, config in CONFIGS.items()
        for layout in choose_layouts(config, choice, max_world_size=MAX_WORLD_SIZE)
    ]
    return sorted(chosen, key=lambda pair: pair[1].world_size)


def pytest_generate_tests(metafunc):
    """The layouts of `-m parity_full` are every legal one; else those that cover every pair."""
    if {"name", "layout"} <= set(metafunc.fixturenames):
        choice = "all" if "full" in metafunc.function.__name__ else "pairs"
        chosen = layouts(choice) if choice == "pairs" or metafunc.config.getoption("-m") == "parity_full" else []
        metafunc.parametrize(
            ("name", "layout"),
            [
                pytest.param(
                    name,
                    layout,
                    id=f"{name}: {layout.name}",
                    marks=[pytest.mark.slow] if layout.world_size > FAST_WORLD_SIZE else [],
                )
                for name, layout in chosen
            ],
            scope="module",
        )


@pytest.fixture(scope="module")
def comparisons():
    """A comparison per preset, which keeps its references."""
    started = {name: Comparison(config) for name, config in CONFIGS.items()}
    yield started
    for comparison in started.values():
        comparison.__exit__()


def assert_equal(comparison, layout, pool, kinds):
    result = comparison.compare(layout, pool(layout.world_size), kinds=kinds)
    assert result.failure is None, result.failure
    assert [finding for finding in result.findings if not finding.passed] == []
    assert [finding.kind for finding in result.findings] == list(kinds)


def kinds_of(layout: Layout) -> list[str]:
    """Four of the ten kinds of batch, others for the next layout; "mixed" for each."""
    first = 3 * (zlib.crc32(layout.name.encode()) % 3)
    others = list(KINDS)[1:]
    return ["mixed", *others[first : first + 3]]


def test_a_layout_computes_what_one_process_does(comparisons, pool, name, layout):
    assert_equal(comparisons[name], layout, pool, kinds_of(layout))


def test_every_kind_of_batch_runs_in_many_layouts():
    ran = Counter(kind for _, layout in layouts("pairs") for kind in kinds_of(layout))
    assert set(ran) == set(KINDS) and min(ran.values()) >= 15


@pytest.mark.parity_full
@pytest.mark.slow
def test_a_layout_of_the_full_product_computes_what_one_process_does(comparisons, pool, name, layout):
    assert_equal(comparisons[name], layout, pool, list(KINDS))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layouts_cover_every_legal_pair_of_sizes(name):
    legal = [
        layout
        for layout in legal_layouts(CONFIGS[name], max_world_size=MAX_WORLD_SIZE)
        if layout.parallel.expert_tensor_parallel_size == 1
    ]
    chosen = covering_layouts(legal)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, legal))
    assert len(chosen) < len(legal) / 4
    assert sum(layout.world_size == MAX_WORLD_SIZE for layout in chosen) >= 8
    assert all(layout.num_microbatches // layout.data_parallel_size >= 2 for layout in chosen)
    values = {dimension: {layout.values()[dimension] for layout in legal} for dimension in legal[0].values()}
    assert values["TP"] == {1, 2, 4} and values["PP"] == {1, 2, 3, 4} and values["VPP"] == {1, 2}
    assert values["CP"] == {1, 2, 4, 8} and values["DP"] == {1, 2, 4, 8} and values["vision"] == {"tensor", "data"}
    assert values["EP"] == ({1} if name == "mm1-tiny" else {1, 2, 4})


@pytest.mark.parametrize("rule", broken.RULES, ids=lambda rule: rule.__name__.replace("_", " "))
def test_a_broken_rule_is_noticed(pool, rule):
    """Each rule is broken in the layout only; the reference is right."""
    name, layout_name, kinds = broken.RULES[rule]
    [layout] = choose_layouts(CONFIGS[name], layout_name, max_world_size=2)
    with Comparison(CONFIGS[name], kinds=kinds, steps=1, job=rule) as comparison:
        result = comparison.compare(layout, pool(layout.world_size))
    assert result.failure is None, result.failure
    assert not any(finding.passed for finding in result.findings)


def test_the_report_names_what_failed(pool, tmp_path):
    config = CONFIGS["mm1-tiny"]
    [layout] = choose_layouts(config, "TP2", max_world_size=2)
    with Comparison(config, kinds=("mixed",), steps=1, job=broken.segments_see_each_other) as comparison:
        failed = comparison.compare(layout, pool(2))
    with Comparison(config, kinds=("mixed",), steps=1, job=broken.raises) as comparison:
        crashed = comparison.compare(layout, pool(2))
    write_report(tmp_path, [failed, crashed], settings=["a setting"], bounds=Bounds())
    record = json.loads((tmp_path / "parity.json").read_text())
    assert not record["passed"] and [entry["passed"] for entry in record["layouts"]] == [False, False]
    text = (tmp_path / "parity.md").read_text()
    assert f"| {failed.findings[0].gradient_of} |" in text or f"| {failed.findings[0].weight_of} (update) |" in text
    assert text.count("| FAIL |") == 2 and "broken on purpose" in text and "0 of 2 layouts" in text
