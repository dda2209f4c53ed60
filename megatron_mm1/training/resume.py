"""Where a run starts: from scratch, from another run's weights, or from where it stopped; and what forbids it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.checkpoint.format import LATEST, CheckpointMetadata, find_checkpoint, read_metadata
from megatron_mm1.config import MM1Config, OptimizerConfig
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError

MOST_SHOWN = 5
"""Keys of a model that is another which are named."""


@dataclass(frozen=True)
class Start:
    """The checkpoint a run starts from; `weights_only`: without its optimizer, schedule and place in the data."""

    checkpoint: Path
    metadata: CheckpointMetadata
    weights_only: bool


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
    else:
        return None
    metadata = read_metadata(checkpoint)
    check_resumable(metadata, config, tokenizer_fingerprint=tokenizer.fingerprint, weights_only=weights_only)
    return Start(checkpoint, metadata, weights_only)


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
    batch, precision or schedule. The layout may be another.

    Raises:
        UserError: listing everything that differs.
    """
    saved = metadata.mm1_config()
    problems = []
    if different := list(_model_differences("model", asdict(saved.model), asdict(config.model))):
        shown = "; ".join(different[:MOST_SHOWN]) + ("; .." if len(different) > MOST_SHOWN else "")
        problems.append(
            f"model.* differs ({shown}): take it from the config.yaml beside the checkpoints (--config FILE)"
        )
    if metadata.tokenizer_fingerprint not in ("", tokenizer_fingerprint):
        problems.append(_wrong_tokenizer(metadata, tokenizer_fingerprint))
    if not weights_only:
        problems += [
            f"{name} was {before} and is {now}: use the same, or start a new run from the weights alone "
            "(--checkpoint.load RUN --checkpoint.finetune true)"
            for name, before, now in _differences(saved, config)
        ]
    if problems:
        raise UserError("\n  - ".join(["this run cannot go on from its checkpoint:", *problems]))


def _model_differences(path: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            yield from _model_differences(f"{path}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield f"{path} was {before} and is {now}"


def _differences(saved: MM1Config, config: MM1Config) -> Iterator[tuple[str, object, object]]:
    """What optimizer state, schedule and data order depend on: (key, before, now) of what differs."""
    for name in ("global_batch_size", "precision", "freeze"):
        before, now = getattr(saved.training, name), getattr(config.training, name)
        if before != now:
            yield f"training.{name}", before, now
    ours, theirs = _schedule(config), _schedule(saved)
    for name, before in vars(theirs).items():
        if getattr(ours, name) != before:
            yield f"optimizer.{name}", before, getattr(ours, name)


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
