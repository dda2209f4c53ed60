"""Each layer multiplies by its component's FP8 recipe: what is in force, on the stand-in, when the layer is called."""

import dataclasses
from typing import Any

import pytest

from megatron_mm1.config import Fp8Config, MM1Config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import Fp8Recipe
from megatron_mm1.config.validation import validate
from tests import te_jobs
from tests.parallel import jobs
from tests.te_jobs import Use

PRODUCTS = ("Linear", "LayerNormLinear", "GroupedLinear")
RECIPES: tuple[Fp8Recipe, ...] = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")


def config_of(name: str, *, fp8: Fp8Config, recompute: str | None = None, **sizes: Any) -> MM1Config:
    """The preset in bf16, in small batches."""
    config = preset(name)
    training = dataclasses.replace(
        config.training,
        global_batch_size=2,
        micro_batch_size=2,
        precision="bf16",
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        vision_recompute=recompute == "full",
    )
    return jobs.with_parallel(dataclasses.replace(config, training=training, fp8=fp8), **sizes)


def products(used: dict[str, Use]) -> dict[str, Use]:
    return {name: use for name, use in used.items() if use.kind in PRODUCTS}


def expected_recipe(name: str, fp8: Fp8Config, *, num_blocks: int) -> str | None:
    """By the meaning of the configuration: the recipe of a layer of this name, None in bf16."""
    component = name.split(".")[0]
    recipe = {"tower": fp8.tower_recipe, "connector": fp8.connector_recipe}.get(component, fp8.decoder_recipe)
    if component == "language_model":
        block = int(name.split(".")[3]) // 2  # attention and feed-forward count apart
        if ".experts." in name:
            recipe = fp8.decoder_recipe if fp8.experts_recipe is None else fp8.experts_recipe
        if block < fp8.bf16_blocks_at_start or block >= num_blocks - fp8.bf16_blocks_at_end:
            recipe = "bf16"
    return None if recipe == "bf16" else recipe


def everywhere(recipe: Fp8Recipe, **settings: Any) -> Fp8Config:
    return Fp8Config(decoder_recipe=recipe, tower_recipe=recipe, connector_recipe=recipe, **settings)


CASES = {
    **{f"everywhere {recipe}": everywhere(recipe) for recipe in RECIPES},
    "decoder alone": Fp8Config(decoder_recipe="fp8_tensorwise", bf16_blocks_at_end=1),
    "tower alone": Fp8Config(tower_recipe="fp8_blockwise"),
    "connector alone": Fp8Config(connector_recipe="fp8_tensorwise"),
    "experts alone": Fp8Config(experts_recipe="fp8_blockwise"),
    "experts in bf16": Fp8Config(decoder_recipe="fp8_delayed", experts_recipe="bf16"),
    "first and last blocks in bf16": everywhere("fp8_blockwise", bf16_blocks_at_start=1, bf16_blocks_at_end=2),
    "each its own": Fp8Config(
        decoder_recipe="fp8_tensorwise",
        experts_recipe="fp8_blockwise",
        tower_recipe="fp8_delayed",
        connector_recipe="fp8_tensorwise",
        bf16_blocks_at_start=1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_product_is_in_its_components_recipe(te_pool, case):
    config = config_of("mm1-tiny-moe", fp8=CASES[case])
    validate(config, world_size=1)
    (used,) = te_pool(1).run(te_jobs.use_of_layers, config)
    num_blocks = config.model.decoder.num_layers
    assert {name: set(use.recipes) for name, use in products(used).items()} == {
        name: {expected_recipe(name, config.fp8, num_blocks=num_blocks)} for name in products(used)
    }
    kinds = {use.kind for use in used.values()}
    assert kinds == {"Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm"}
    assert not [name for name in used if "embedding" in name or "output_layer" in name or "router" in name]


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_layers_multiply_as_they_did(te_pool, recipe, recompute):
    config = config_of("mm1-tiny-moe", fp8=everywhere(recipe), recompute=recompute)
    (used,) = te_pool(1).run(te_jobs.use_of_layers, config, backward=True)
    assert {use.recipes for use in products(used).values()} <= {(recipe,), (recipe, recipe)}
    if recompute == "full":
        layers = {name: use for name, use in products(used).items() if ".layers." in name}
        assert {use.recipes for use in layers.values()} == {(recipe, recipe)}


STAGES = {
    "TP2": (dict(tensor_model_parallel_size=2, sequence_parallel=True), lambda rank: (0, 1)),
    "CP2": (dict(context_parallel_size=2), lambda rank: (0, 1)),
    "DP2": (dict(), lambda rank: (0, 1)),
    "EP2": (dict(expert_model_parallel_size=2), lambda rank: (0, 1)),
    "PP2": (dict(pipeline_model_parallel_size=2), lambda rank: (rank,)),
}


@pytest.mark.parametrize("layout", STAGES)
def test_delayed_scales_are_agreed_on_within_a_pipeline_stage(te_pool, layout):
    """Stages run in turns and have different layers: agreement over the whole world would wait for ever."""
    sizes, ranks_of = STAGES[layout]
    config = config_of("mm1-tiny-moe", fp8=everywhere("fp8_delayed"), recompute="full", **sizes)
    for rank, used in enumerate(te_pool(2).run(te_jobs.use_of_layers, config, backward=True)):
        groups = {group for use in products(used).values() for group in use.groups}
        assert groups == {ranks_of(rank)}


@pytest.mark.parametrize("experts", ["bf16", "fp8_tensorwise"])
def test_weights_are_kept_in_fp8_in_the_decoders_fp8_layers_alone(te_pool, experts):
    fp8 = everywhere("fp8_tensorwise", experts_recipe=experts, bf16_blocks_at_end=1, fp8_param=True)
    config = config_of("mm1-tiny-moe", fp8=fp8, use_distributed_optimizer=True)
    (used,) = te_pool(1).run(te_jobs.use_of_layers, config)
    num_blocks = config.model.decoder.num_layers
    assert {name: use.made_in for name, use in products(used).items()} == {
        name: expected_recipe(name, fp8, num_blocks=num_blocks) if name.startswith("language_model") else None
        for name in products(used)
    }


@pytest.mark.parametrize("case", ["tower alone", "experts alone", "decoder alone"])
def test_fp8_copies_of_weights_are_made_anew_for_each_step(te_pool, case):
    """megatron-core itself does so only where the decoder has a recipe: the others' would stay as they began."""
    config = config_of("mm1-tiny-moe", fp8=CASES[case])
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=1))
    (renewed,) = te_pool(1).run(te_jobs.weights_renewed, config, passes=2)
    assert renewed == {(True, False, True, False)}
