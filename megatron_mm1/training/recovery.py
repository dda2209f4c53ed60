"""What a run does after a step whose update was not applied, where it does not just go on: go back, or end."""

from pathlib import Path
from typing import NoReturn

import torch

from megatron_mm1.checkpoint.format import CheckpointMetadata, make_latest, read_metadata
from megatron_mm1.errors import UserError
from megatron_mm1.training.checkpointing import state_is_finite
from megatron_mm1.training.progress import Progress
from megatron_mm1.training.resume import Start
from megatron_mm1.training.saving import CheckpointSaver


def roll_back(progress: Progress, checkpoint: Path, *, saver: CheckpointSaver) -> CheckpointMetadata:
    """Load an earlier checkpoint of the run, which then counts as its newest: a job that starts again goes on there.

    Returns:
        What the checkpoint says of itself.
    """
    saver.wait()
    if torch.distributed.get_rank() == 0:
        make_latest(checkpoint)
    metadata = read_metadata(checkpoint)
    progress.load(Start(checkpoint, metadata, weights_only=False))
    return metadata


def end_run(progress: Progress, metadata: CheckpointMetadata, *, why: str, saver: CheckpointSaver) -> NoReturn:
    """Save what is worth keeping, and end.

    Args:
        metadata: of a checkpoint of this moment.
        why: the run ends, as a clause.

    Raises:
        UserError: always.
    """
    state = progress.state()
    saver.max_failures = 0
    if state_is_finite(state):
        saver.save(metadata, state)
        advice = "a checkpoint was saved: start again to go on behind this batch"
    else:
        advice = "weights or optimizer state are not finite, so nothing was saved: go on from an earlier checkpoint"
    saver.wait()
    raise UserError(f"training ended at iteration {progress.iteration}, which was not applied: {why} ({advice})")
