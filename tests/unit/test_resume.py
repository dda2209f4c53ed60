"""What forbids a run to go on from its checkpoint: each setting alone, and what allows it."""

from dataclasses import fields, replace
from typing import Any

import pytest

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import LoraConfig, MM1Config
from megatron_mm1.config.command_line import set_override
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import BatchSizeStage, OptimizerConfig
from megatron_mm1.config.serialization import from_dict, to_dict
from megatron_mm1.errors import UserError
from megatron_mm1.training.resume import check_resumable

SAVED = preset("mm1-tiny")
STATE = {"training.precision": "bf16", "training.freeze": ["tower"], "optimizer.optimizer": "adafactor"}
SCHEDULE = {
    "training.global_batch_size": 16,
    "training.batch_size_ramp": [{"until": 5, "global_batch_size": 4}],
    "training.frozen_steps": {"tower": 3},
    "training.output_z_loss_coeff": 0.5,
    "training.train_iters": 900,  # the length of the cosine, which is not set
}


def changed(key: str, value: Any) -> MM1Config:
    values = to_dict(SAVED)
    set_override(values, key, value)
    return from_dict(values)


def other(value: Any) -> Any:
    """Another value of an optimizer's setting."""
    return 0.01 if value is None else value / 2 + 0.001


def checkpoint(config: MM1Config = SAVED, *, iteration: int = 10, **about: Any) -> CheckpointMetadata:
    consumed = iteration * config.training.global_batch_size
    known = dict(tokenizer_fingerprint="abc", plan_fingerprint="", consumed_sequences=consumed)
    return CheckpointMetadata(iteration=iteration, config=to_dict(config), **{**known, **about})


def check(config: MM1Config, metadata: CheckpointMetadata | None = None, **options: Any) -> None:
    check_resumable(metadata or checkpoint(), config, **{"tokenizer_fingerprint": "abc", **options})


def accepting(config: MM1Config) -> MM1Config:
    return replace(config, checkpoint=replace(config.checkpoint, accept_other_schedule=True))


def test_the_saved_configuration_goes_on_in_any_layout() -> None:
    check(SAVED)
    check(changed("parallel.pipeline_model_parallel_size", 2))


@pytest.mark.parametrize("key", STATE)
def test_another_state_is_refused_whatever_is_accepted(key: str) -> None:
    config = changed(key, STATE[key])
    for asked in (config, accepting(config)):
        with pytest.raises(UserError, match=rf"{key} was .* and is .*: use the same, or start a new run"):
            check(asked)
    check(config, weights_only=True)


@pytest.mark.parametrize("key", SCHEDULE)
def test_another_schedule_must_be_accepted(key: str) -> None:
    config = changed(key, SCHEDULE[key])
    shown = "optimizer.lr_decay_iters" if key == "training.train_iters" else key
    with pytest.raises(UserError, match=rf"{shown} was .* and is .*accept_other_schedule true"):
        check(config)
    check(config, weights_only=True)
    if key not in ("training.global_batch_size", "training.batch_size_ramp"):
        check(accepting(config))


@pytest.mark.parametrize("name", [field.name for field in fields(OptimizerConfig) if field.name != "optimizer"])
def test_every_setting_of_the_optimizer_counts(name: str) -> None:
    before = getattr(SAVED.optimizer, name)
    value = 7 if name.endswith("iters") else other(before)
    config = replace(SAVED, optimizer=replace(SAVED.optimizer, **{name: value}))
    with pytest.raises(UserError, match=rf"optimizer\.{name} was "):
        check(config)
    check(accepting(config))


def test_a_longer_run_with_a_set_cosine_goes_on() -> None:
    saved = changed("optimizer.lr_decay_iters", 1000)
    longer = replace(saved, training=replace(saved.training, train_iters=900))
    check(longer, checkpoint(saved))


def test_batch_sizes_of_the_past_must_be_those_that_were() -> None:
    """A new size from the next step on is accepted, one that rewrites the past is told how to be one."""
    config = accepting(changed("training.global_batch_size", 16))
    with pytest.raises(UserError) as refused:
        check(config)
    assert "its 10 steps took 80 sequences" in str(refused.value) and "would have taken 160" in str(refused.value)
    assert "--training.batch_size_ramp '[{'until': 10, 'global_batch_size': 8}]'" in str(refused.value)
    ramp = (BatchSizeStage(until=10, global_batch_size=8),)
    check(replace(config, training=replace(config.training, batch_size_ramp=ramp)))


def test_stages_of_the_past_are_spelled_out() -> None:
    ramp = (BatchSizeStage(until=4, global_batch_size=4), BatchSizeStage(until=20, global_batch_size=8))
    saved = replace(SAVED, training=replace(SAVED.training, batch_size_ramp=ramp, global_batch_size=16))
    other_ramp = replace(saved, training=replace(saved.training, batch_size_ramp=()))
    with pytest.raises(UserError, match=r"\[\{'until': 4, 'global_batch_size': 4\}, \{'until': 10, .*: 8\}\]"):
        check(accepting(other_ramp), checkpoint(saved, consumed_sequences=4 * 4 + 6 * 8))


def test_another_model_is_refused_even_for_its_weights_alone() -> None:
    for only in (False, True):
        with pytest.raises(UserError, match=r"model\.decoder\.num_layers was 4 and is 5\)") as refused:
            check(changed("model.decoder.num_layers", 5), weights_only=only)
        assert "resize" not in str(refused.value)
    with pytest.raises(UserError, match="make a checkpoint first, by mm1 convert resize"):
        check(changed("model.vision.image_size", 96))
    with pytest.raises(UserError, match=r"model\.moe was None and is "):
        check(preset("mm1-tiny-moe"))


LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, tower_targets=("linear_qkv", "linear_fc1"))


def adapted(**settings: Any) -> MM1Config:
    return replace(SAVED, model=replace(SAVED.model, lora=replace(LORA, **settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 8},
        {"alpha": 16.0},
        {"use_rslora": True},
        {"decoder_targets": ("linear_qkv", "linear_proj")},
        {"tower_targets": ()},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_that_would_mean_something_else_are_refused(settings: dict[str, Any]) -> None:
    config, saved = adapted(**settings), checkpoint(adapted())
    for asked in (config, accepting(config)):
        for only in (False, True):
            with pytest.raises(UserError, match=r"its adapters were trained with model\.lora"):
                check(asked, saved, weights_only=only)
    with pytest.raises(UserError, match="its adapters were trained") as refused:
        check(SAVED, saved)
    assert "dropout was" not in str(refused.value)


def test_layers_of_adapters_have_no_order_and_one_scale_two_names() -> None:
    again = adapted(
        decoder_targets=LORA.decoder_targets[::-1], tower_targets=LORA.tower_targets[::-1], alpha=4.0, use_rslora=True
    )
    for only in (False, True):
        check(again, checkpoint(adapted()), weights_only=only)


def test_another_dropout_of_adapters_must_be_accepted_and_is_nothing_to_their_weights() -> None:
    config, saved = adapted(dropout=0.0), checkpoint(adapted())
    with pytest.raises(
        UserError, match=r"model\.lora\.dropout was 0\.1 and is 0\.0: .*accept_other_schedule true"
    ) as refused:
        check(config, saved)
    assert "its adapters were trained" not in str(refused.value)
    check(accepting(config), saved)
    check(config, saved, weights_only=True)


def test_only_some_of_many_differences_are_shown() -> None:
    with pytest.raises(UserError, match=r"model\.[^;]*(; model\.[^;]*){4}; \.\.\)"):
        check(preset("mm1-3b"))


def test_another_tokenizer_is_refused_even_for_the_weights_alone() -> None:
    for only in (False, True):
        with pytest.raises(UserError, match=r"wrong tokenizer: its SHA-256 is xyz\.\., .* was trained with abc\.\."):
            check(SAVED, tokenizer_fingerprint="xyz", weights_only=only)
    check(SAVED, checkpoint(tokenizer_fingerprint=""), tokenizer_fingerprint="xyz")


def test_everything_that_differs_is_said_at_once() -> None:
    config = replace(changed("training.precision", "bf16"), optimizer=replace(SAVED.optimizer, lr=0.5), name="other")
    with pytest.raises(UserError) as refused:
        check(config, tokenizer_fingerprint="xyz")
    assert str(refused.value).count("\n  - ") == 3
