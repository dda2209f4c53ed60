"""Scales of "fp8_delayed" in checkpoints, on the stand-in for Transformer Engine, which refuses its own pickles as the
release does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm1.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_mm1.checkpoint.format import find_checkpoint
from megatron_mm1.config import Fp8Config, MM1Config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import Fp8Recipe
from tests import te_jobs
from tests.parallel import jobs

Scales = dict[str, dict[str, torch.Tensor]]


def config_of(corpus: Path, recipe: Fp8Recipe, **sizes: Any) -> MM1Config:
    config = preset("mm1-tiny-moe")
    return jobs.with_parallel(
        dataclasses.replace(
            config,
            fp8=Fp8Config(decoder_recipe=recipe, tower_recipe=recipe, connector_recipe=recipe),
            training=dataclasses.replace(config.training, global_batch_size=4, micro_batch_size=2, precision="bf16"),
            data=dataclasses.replace(config.data, tokenizer=str(corpus / "tokenizer.model")),
        ),
        **sizes,
    )


def all_of(parts: list[Scales]) -> Scales:
    """What the ranks have together, who agree where several have the same."""
    together: Scales = {}
    for part in parts:
        for key, scales in part.items():
            for name, tensor in scales.items():
                assert torch.equal(together.setdefault(key, scales)[name], tensor), (key, name)
    return together


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same": ({}, {}),
    "the same, TP2+SP": (dict(tensor_model_parallel_size=2, sequence_parallel=True),) * 2,
    "TP2+SP to one": (dict(tensor_model_parallel_size=2, sequence_parallel=True), {}),
    "EP2 to PP2": (dict(expert_model_parallel_size=2), dict(pipeline_model_parallel_size=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_come_back_in_any_layout(te_pool, demo_corpus, tmp_path, layout):
    before, after = (config_of(demo_corpus, "fp8_delayed", **sizes) for sizes in LAYOUTS[layout])
    saved = all_of(te_pool(max(LAYOUTS[layout][0].values(), default=1)).run(te_jobs.save_scales, before, tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    results = te_pool(max(LAYOUTS[layout][1].values(), default=1)).run(te_jobs.load_scales, after, checkpoint)
    loaded = all_of([scales for scales, _ in results])
    assert {without for _, without in results} == {()}
    assert loaded.keys() == saved.keys()
    for key, scales in saved.items():
        assert scales["amax_history_fwd"].shape == (1024, 3) and scales["amax_history_fwd"].any(), key
        assert all(torch.equal(loaded[key][name], tensor) for name, tensor in scales.items()), key


@pytest.mark.parametrize(
    ("before", "after", "without"),
    [
        ("fp8_delayed", "fp8_tensorwise", ()),
        ("fp8_tensorwise", "fp8_delayed", ("connector", "decoder", "experts", "tower")),
    ],
)
def test_another_recipe_starts_without(te_pool, demo_corpus, tmp_path, before, after, without):
    te_pool(1).run(te_jobs.save_scales, config_of(demo_corpus, before), tmp_path)
    checkpoint = find_checkpoint(tmp_path)
    objects = [name for name in DistCheckpoint(checkpoint).objects if "_extra_state" in name]
    assert bool(objects) == (before == "fp8_delayed")
    [(scales, said)] = te_pool(1).run(te_jobs.load_scales, config_of(demo_corpus, after), checkpoint)
    assert (scales, said) == ({}, without)
