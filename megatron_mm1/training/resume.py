"""Where a run starts: from scratch, from another run's weights, or from where it stopped; and what forbids it."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.checkpoint.format import LATEST, CheckpointMetadata, find_checkpoint, read_metadata
from megatron_mm1.config import LoraConfig, MM1Config, OptimizerConfig
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.derived import COMPONENTS, lora_scale, lora_targets
from megatron_mm1.config.keys import value_at
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError

MOST_SHOWN = 5
"""Keys of a model that is another which are named."""

_STATE = ("training.precision", "training.freeze", "optimizer.optimizer")
"""What the optimizer's state depends on."""
_SCHEDULE = (
    "training.global_batch_size",
    "training.batch_size_ramp",
    "training.frozen_steps",
    "training.output_z_loss_coeff",
)
"""What else a step depends on, besides the optimizer's other settings."""
_PREPROCESSING = ("model.vision.image_resize",)
"""What weights can be trained on with another value, as LLaVA-1.5's two stages do."""


@dataclass(frozen=True)
class Start:
    """The checkpoint a run starts from.

    Attributes:
        weights_only: without its optimizer, schedule and place in the data.
        changes: settings of the schedule that are others than before, as sentences.
    """

    checkpoint: Path
    metadata: CheckpointMetadata
    weights_only: bool
    changes: tuple[str, ...] = ()


def starting_point(config: MM1Config, tokenizer: Tokenizer) -> Start | None:
    """Where to start, checked against the configuration; None: from scratch.

    Raises:
        UserError: there is no such checkpoint, or it and the configuration do not fit.
    """
    own = Path(config.run_dir) / "checkpoints" / LATEST
    if own.is_file():  # a run that has begun goes on from itself, whatever it was started from
        checkpoint, weights_only = find_checkpoint(config.run_dir), False
    elif config.checkpoint.load is not None:
        checkpoint, weights_only = find_checkpoint(config.checkpoint.load), config.checkpoint.finetune
    elif config.model.lora is not None:
        raise UserError(
            "model.lora trains adapters beside weights that stay as they are, and this run has none to start from: "
            "name a checkpoint, with --checkpoint.load DIR --checkpoint.finetune true"
        )
    else:
        return None
    metadata = read_metadata(checkpoint)
    check_resumable(metadata, config, tokenizer_fingerprint=tokenizer.fingerprint, weights_only=weights_only)
    changes = () if weights_only else tuple(map(str, _schedule_changes(metadata.mm1_config(), config)))
    return Start(checkpoint, metadata, weights_only, changes)


def check_ranks_agree(start: Start | None) -> None:
    """Make sure that all ranks start from what rank 0 does; every rank calls it.

    Raises:
        UserError: this rank found something else, as where run_dir is not on a file system that the nodes share.
    """
    mine = None if start is None else (str(start.checkpoint), start.metadata.iteration)
    theirs = [mine]
    torch.distributed.broadcast_object_list(theirs, src=0)
    if theirs[0] != mine:
        raise UserError(
            f"rank {torch.distributed.get_rank()} would start from {mine or 'scratch'}, rank 0 from "
            f"{theirs[0] or 'scratch'}: put run_dir and checkpoint.load on a file system that all nodes share"
        )


def check_resumable(
    metadata: CheckpointMetadata, config: MM1Config, *, tokenizer_fingerprint: str, weights_only: bool = False
) -> None:
    """Refuse a checkpoint of another model or tokenizer, and, unless its weights are all that is wanted, one of another
    batch, precision or schedule (which `checkpoint.accept_other_schedule` allows). The layout may be another.

    Raises:
        UserError: listing everything that differs.
    """
    saved = metadata.mm1_config()
    problems = [*_other_adapters(saved, metadata.components, config, weights_only=weights_only)]
    before, now = (asdict(replace(model, lora=None)) for model in (saved.model, config.model))
    differences = _model_differences("model", before, now)
    if different := [text for path, text in differences if not (weights_only and path in _PREPROCESSING)]:
        shown = "; ".join(different[:MOST_SHOWN]) + ("; .." if len(different) > MOST_SHOWN else "")
        is_resized = saved.model.vision.image_size != config.model.vision.image_size
        resize = "; for images of another size make a checkpoint first, by mm1 convert resize" if is_resized else ""
        problems.append(
            f"model.* differs ({shown}): take it from the config.yaml beside the checkpoints (--config FILE){resize}"
        )
    if metadata.tokenizer_fingerprint not in ("", tokenizer_fingerprint):
        problems.append(_wrong_tokenizer(metadata, tokenizer_fingerprint))
    if not weights_only:
        anew = "start a new run from the weights alone (--checkpoint.load RUN --checkpoint.finetune true)"
        problems += [f"{change}: use the same, or {anew}" for change in _state_changes(saved, config)]
        changes = _schedule_changes(saved, config)
        if not config.checkpoint.accept_other_schedule:
            accept = "go on all the same (--checkpoint.accept_other_schedule true)"
            problems += [f"{change}: use the same, {accept}, or {anew}" for change in changes]
        problems += _other_steps(metadata, config)
    if problems:
        raise UserError("\n  - ".join(["this run cannot go on from its checkpoint:", *problems]))


def _other_adapters(
    saved: MM1Config, components: Collection[str], config: MM1Config, *, weights_only: bool
) -> Iterator[str]:
    before, now = saved.model.lora, config.model.lora
    if before is not None and _meaning(before) != _meaning(now):
        yield (
            f"its adapters were trained with model.lora {asdict(before)}, which is {now and asdict(now)}: use the same "
            "(--config FILE), or merge them into the weights first (mm1 convert merge)"
        )
    elif now is not None and before is None and not weights_only:
        yield (
            "model.lora is set, and its checkpoint has no adapters: leave it out, or start a new run from the weights "
            "alone (--checkpoint.load RUN --checkpoint.finetune true)"
        )
    for component in COMPONENTS:
        if lora_targets(now, component) and component not in components:
            yield f"model.lora adapts the {component}, and its checkpoint has none: start from one that has it"


def _meaning(lora: LoraConfig | None) -> tuple[object, ...]:
    """What the numbers in A and B depend on: not dropout, which is of training, nor the order of the layers."""
    if lora is None:
        return ()
    return lora.rank, lora_scale(lora), *(lora_targets(lora, component) for component in COMPONENTS)


def _model_differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, str]]:
    """Keys of which the two have other values, and a sentence about each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            yield from _model_differences(f"{path}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield path, f"{path} was {before} and is {now}"


@dataclass(frozen=True)
class _Change:
    """A setting that is another than when the checkpoint was saved."""

    key: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)} and is {_shown(self.now)}"


def _shown(value: object) -> object:
    """Stages of a ramp as the plain values that a configuration has."""
    return [vars(item) for item in value] if isinstance(value, tuple) and value and is_dataclass(value[0]) else value


def _state_changes(saved: MM1Config, config: MM1Config) -> list[_Change]:
    changes = [_Change(key, value_at(saved, key), value_at(config, key)) for key in _STATE]
    return [change for change in changes if change.before != change.now]


def _schedule_changes(saved: MM1Config, config: MM1Config) -> list[_Change]:
    changes = [_Change(key, value_at(saved, key), value_at(config, key)) for key in _SCHEDULE]
    ours, theirs = vars(_schedule(config)), vars(_schedule(saved))
    changes += [_Change(f"optimizer.{name}", theirs[name], ours[name]) for name in theirs]
    if saved.model.lora is not None and config.model.lora is not None:
        changes.append(_Change("model.lora.dropout", saved.model.lora.dropout, config.model.lora.dropout))
    return [change for change in changes if change.before != change.now and change.key not in _STATE]


def _other_steps(metadata: CheckpointMetadata, config: MM1Config) -> Iterator[str]:
    """Batch sizes that would have made the steps taken use another number of sequences."""
    expected = BatchSizes.of(config.training).sequences_before(metadata.iteration)
    if config.checkpoint.accept_other_schedule and expected != metadata.consumed_sequences:
        saved = metadata.mm1_config().training
        stages = [vars(stage) for stage in saved.batch_size_ramp if stage.until < metadata.iteration]
        stages.append(
            {"until": metadata.iteration, "global_batch_size": BatchSizes.of(saved).at(metadata.iteration - 1)}
        )
        yield (
            f"its {metadata.iteration} steps took {metadata.consumed_sequences} sequences, with this configuration's "
            f"batch sizes they would have taken {expected}: change them from the next step on, with "
            f"--training.batch_size_ramp '{stages}'"
        )


def _schedule(config: MM1Config) -> OptimizerConfig:
    """The optimizer's settings with the length of the cosine spelled out."""
    optimizer = config.optimizer
    return replace(optimizer, lr_decay_iters=optimizer.lr_decay_iters or config.training.train_iters)


def check_tokenizer(metadata: CheckpointMetadata, fingerprint: str) -> None:
    """Refuse a tokenizer that is not the one the model was trained with.

    Raises:
        UserError: they differ.
    """
    if metadata.tokenizer_fingerprint not in ("", fingerprint):
        raise UserError(_wrong_tokenizer(metadata, fingerprint))


def _wrong_tokenizer(metadata: CheckpointMetadata, fingerprint: str) -> str:
    return (
        f"wrong tokenizer: its SHA-256 is {fingerprint[:12]}.., the checkpoint was trained with "
        f"{metadata.tokenizer_fingerprint[:12]}..: set data.tokenizer to that file"
    )
