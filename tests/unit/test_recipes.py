"""Recipes: what they change about a preset or a file, and what outranks them."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm1.config.derived import num_patches
from megatron_mm1.config.loading import from_dict, load_config, to_dict, to_yaml
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.recipes import RECIPES, apply_recipe
from megatron_mm1.config.schema import ModelConfig
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError

LOAD = ["--checkpoint.load", "runs/mm1-3b"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_every_preset(name: str, recipe: str) -> None:
    """In the smallest layout of the preset; fine-tuning names a checkpoint."""
    config = load_config(["--preset", name, "--recipe", recipe, *LOAD])
    parallel = config.parallel
    validate(config, world_size=parallel.tensor_model_parallel_size * parallel.expert_model_parallel_size)
    assert from_dict(to_dict(config)) == config
    assert squashing(config.model) == squashing(preset(name).model)


def squashing(model: ModelConfig) -> ModelConfig:
    """A model whose images are squashed: preprocessing is the only thing about a model that a recipe may change."""
    return replace(model, vision=replace(model.vision, image_resize="squash"))


def test_fine_tuning_is_the_papers() -> None:
    config = load_config(["--preset", "mm1-3b", "--recipe", "sft", *LOAD])
    optimizer, training = config.optimizer, config.training
    assert (optimizer.optimizer, optimizer.lr, optimizer.min_lr_ratio) == ("adafactor", 1e-5, 0.0)
    assert (optimizer.vision_lr, optimizer.connector_lr) == (None, None)
    assert (training.train_iters, training.global_batch_size, config.data.seq_length) == (10_000, 256, 2048)
    assert training.freeze == () and config.checkpoint.finetune and config.data.long_documents == "cut"
    assert config.data.max_images_per_sequence == 14  # 14 x 144 + 2 of 2048


def test_fine_tuning_without_weights_is_refused() -> None:
    config = load_config(["--preset", "mm1-3b", "--recipe", "sft"])
    with pytest.raises(ConfigError, match=r"checkpoint\.finetune takes the weights of checkpoint\.load, which is null"):
        validate(config, world_size=1)


@pytest.mark.parametrize(
    ("recipe", "lr", "batch", "steps", "warmup", "freeze", "resize"),
    [
        ("llava15-align", 1e-3, 256, 2181, 66, ("tower", "decoder"), "shorter_side_crop"),
        ("llava15-sft", 2e-5, 128, 5198, 156, ("tower",), "pad"),
    ],
)
def test_llava15_is_as_published(
    recipe: str, lr: float, batch: int, steps: int, warmup: int, freeze: tuple[str, ...], resize: str
) -> None:
    """One epoch of 558,128 captions, then of 665,298 conversations, an example a sequence; warm-up 3 %."""
    config = load_config(["--preset", "llava15-7b", "--recipe", recipe, *LOAD])
    optimizer, training, model = config.optimizer, config.training, config.model
    assert (optimizer.optimizer, optimizer.lr, optimizer.connector_lr) == ("adamw", lr, None)
    assert (optimizer.min_lr_ratio, optimizer.lr_warmup_iters, optimizer.weight_decay) == (0.0, warmup, 0.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert (training.global_batch_size, training.train_iters, training.freeze) == (batch, steps, freeze)
    assert (config.data.packing, config.data.seq_length, config.checkpoint.finetune) == ("none", 2048, True)
    assert (model.vision.image_resize, model.vision.feature_layer, model.connector.connector) == (resize, -2, "mlp")
    assert model.connector.tokens_per_image == num_patches(model.vision) == 576


def test_mixture_of_mm1_5() -> None:
    config = load_config(["--preset", "mm1-3b", "--recipe", "mm1.5-mixture"])
    assert {source.name: source.weight for source in config.data.sources} == {
        "captions": 0.5,
        "interleaved": 0.1,
        "text": 0.4,
    }
    assert config.optimizer == preset("mm1-3b").optimizer


def test_files_and_options_outrank_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: sft\noptimizer: {lr: 0.5}\ntraining: {seed: 3}\n")
    arguments = ["--preset", "mm1-tiny", "--config", str(tmp_path / "run.yaml"), "--training.seed", "4"]
    config = load_config(arguments)
    assert (config.optimizer.optimizer, config.optimizer.lr, config.training.seed) == ("adafactor", 0.5, 4)


def test_a_recipe_changes_the_first_file_where_no_preset_is_named(tmp_path: Path) -> None:
    """As an imported model, or another run, has one; later files outrank the recipe."""
    whole, settings = tmp_path / "config.yaml", tmp_path / "settings.yaml"
    whole.write_text(to_yaml(preset("mm1-tiny-moe")))
    settings.write_text("training: {train_iters: 7}\n")
    config = load_config(["--recipe", "sft", "--config", str(whole), "--config", str(settings)])
    expected = apply_recipe("sft", preset("mm1-tiny-moe"))
    assert config.training.train_iters == 7
    assert (config.model, config.optimizer, config.data) == (expected.model, expected.optimizer, expected.data)


def test_unknown_recipes_are_told_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'stf': use one of sft, mm1\.5-mixture, .*; did you mean 'sft'"
    ):
        load_config(["--preset", "mm1-tiny", "--recipe", "stf"])
