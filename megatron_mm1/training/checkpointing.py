"""What a training checkpoint holds of the live model, and how it comes back into any layout.

`CheckpointSaver` (saving.py) writes it, in the form that `checkpoint/format.py` describes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm1.checkpoint.format import read_manifest, read_metadata, verify_files
from megatron_mm1.checkpoint.safe_pickle import check_checkpoint, object_names
from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.errors import UserError
from megatron_mm1.model.lora import is_adapter
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.parallel.device import device
from megatron_mm1.training import format_1
from megatron_mm1.training.build import Model, unwrap
from megatron_mm1.training.fp8_scales import restore_scales, with_places, with_scales
from megatron_mm1.training.optimizer_state import (
    fill_state,
    set_steps_taken,
    sharded_optimizer_state,
    steps_taken,
)
from megatron_mm1.training.random_state import (
    place_for_random_state,
    restore_random_state,
    sharded_random_state,
)
from megatron_mm1.training.sharding import NAMING


def training_state(
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    pg_collection: ProcessGroupCollection,
) -> dict[str, Any]:
    """Everything of this rank that a checkpoint keeps, as parts of whole tensors that share the live ones' memory."""
    fill_state(optimizer)
    return {
        "model": _model_state(model, pg_collection, extra_state=with_scales),
        "optimizer": _by_name(sharded_optimizer_state(model, optimizer, pg_collection=pg_collection)),
        "optimizer_steps": steps_taken(optimizer),
        "scheduler": scheduler.state_dict(),
        "rng_state": sharded_random_state(),
    }


def state_is_finite(state: dict[str, Any]) -> bool:
    """Whether no rank's part of a `training_state` has an infinite number or a NaN in it."""
    parts = [part.data for part in nested_values(state) if isinstance(part, ShardedTensor | ShardedTensorFactory)]
    finite = torch.tensor(all(bool(part.isfinite().all()) for part in parts), dtype=torch.int32, device=device())
    torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
    return bool(finite)


def load_weights(
    checkpoint: Path, model: Sequence[torch.nn.Module], *, pg_collection: ProcessGroupCollection
) -> tuple[str, ...]:
    """Load the weights of a rank's stages into this layout, whatever layout they were saved from.

    A model's adapters keep their initial weights where the checkpoint has none.

    Returns:
        The components that the checkpoint lacks, which keep the weights they have.

    Raises:
        UserError: a file is damaged, or tensors are missing or of another shape.
    """
    metadata = read_metadata(checkpoint)
    present, has_adapters = metadata.components, metadata.mm1_config().model.lora is not None
    state = _model_state(model, pg_collection, components=present, with_adapters=has_adapters)
    _load_model_state(model, _read(checkpoint, {"model": state}))
    return tuple(name for name in COMPONENTS if name not in present)


def load_checkpoint(
    checkpoint: Path,
    config: MM1Config,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    pg_collection: ProcessGroupCollection,
) -> tuple[str, ...]:
    """Load weights, optimizer state and schedule into this layout, to go on from where the checkpoint was saved.

    Random number generators go on too where the layout is the one that wrote the checkpoint; in another one the numbers
    of the ranks mean something else, and they keep their seeds.

    Returns:
        The components that multiply by "fp8_delayed" and whose scales the checkpoint lacks on some rank: their
        histories start empty.

    Raises:
        UserError: a file is damaged, or tensors are missing or of another shape.
    """
    metadata = read_metadata(checkpoint)
    if not metadata.has_training_state:
        raise UserError(
            f"{checkpoint} holds weights only: start a new run from it with --checkpoint.load {checkpoint} "
            "--checkpoint.finetune true"
        )
    saved = metadata.mm1_config()
    fill_state(optimizer)
    state: dict[str, Any] = {"model": _model_state(model, pg_collection)}
    by_buffers = metadata.format_version == 1 and saved.parallel.use_distributed_optimizer
    if by_buffers:
        format_1.check_layout(saved, config)
        state["optimizer"] = format_1.distributed_optimizer_state(model, optimizer, pg_collection=pg_collection)
    else:
        state["optimizer"] = _by_name(sharded_optimizer_state(model, optimizer, pg_collection=pg_collection))
    same_ranks = metadata.world_size == torch.distributed.get_world_size()
    if same_ranks and saved.parallel == config.parallel:
        state["rng_state"] = place_for_random_state()
    targets = {name: part.data for name, part in state["optimizer"].items()} if not by_buffers else {}

    loaded = _read(checkpoint, state)
    without_scales = _load_model_state(model, loaded)
    if by_buffers:
        steps = format_1.load_distributed_optimizer_state(optimizer, loaded["optimizer"])
    else:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(loaded["optimizer"][name])
        old = metadata.format_version == 1
        steps = format_1.plain_steps_taken(loaded["optimizer"]) if old else loaded["optimizer_steps"]
    set_steps_taken(optimizer, steps)
    scheduler.num_steps = 0  # loading counts on from there
    scheduler.load_state_dict(loaded["scheduler"])
    if "rng_state" in state:
        restore_random_state(loaded["rng_state"])
    everywhere: list[frozenset[str]] = [frozenset()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, without_scales)
    return tuple(sorted(frozenset().union(*everywhere)))


def _by_name(parts: list[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {f"{part.key} from {part.global_offset}": part for part in parts}


def _read(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    _verify_together(checkpoint)
    objects = _checked_objects(checkpoint)
    for stage in sharded_state["model"].values():  # scales of delayed FP8 that the checkpoint lacks
        for name in [name for name, entry in stage.items() if isinstance(entry, ShardedObject)]:
            if stage[name].unique_key not in objects:
                del stage[name]
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded_state, str(checkpoint))
        return loaded
    except (Exception, CheckpointException) as error:  # which one depends on what is wrong; torch's is no Exception
        raise UserError(f"cannot load checkpoint {checkpoint}: {_first_line(error)}") from error


def _checked_objects(checkpoint: Path) -> set[str]:
    """The names of a checkpoint's objects, read on rank 0 in a way that cannot run what somebody put into them.

    Raises:
        UserError: an object holds more than tensors and plain values, on every rank.
    """
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [object_names(check_checkpoint(checkpoint)), None]
        except UserError as error:
            outcome = [None, str(error)]
    torch.distributed.broadcast_object_list(outcome, src=0)
    names, refusal = outcome
    if refusal:
        raise UserError(refusal)
    return set(names)


def _verify_together(checkpoint: Path) -> None:
    """Compare the files with the manifest, each on one rank; every rank raises if one differs."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = sorted(read_manifest(checkpoint))[rank::world_size]
    verdict = None
    try:
        verify_files(checkpoint, mine)
    except UserError as error:
        verdict = str(error)
    verdicts: list[str | None] = [None] * world_size
    torch.distributed.all_gather_object(verdicts, verdict)
    if faults := [text for text in verdicts if text]:
        raise UserError("\n".join(faults))


def _model_state(
    model: Sequence[torch.nn.Module],
    pg_collection: ProcessGroupCollection,
    *,
    components: Sequence[str] = tuple(COMPONENTS),
    with_adapters: bool = True,
    extra_state: Callable[[MM1Model, Mapping[str, Any]], dict[str, Any]] = with_places,
) -> dict[str, Any]:
    """Sharded tensors by stage of this rank; on disk each has a name of its own, whatever the stages."""
    metadata = {**NAMING, "dp_cp_group": pg_collection.dp_cp}
    prefixes = tuple(COMPONENTS[name] for name in components)
    state = {}
    for number, chunk in enumerate(model):
        described = extra_state(unwrap(chunk), unwrap(chunk).sharded_state_dict(metadata=metadata))
        state[f"stage {number}"] = {
            name: entry
            for name, entry in described.items()
            if name.startswith(prefixes) and (with_adapters or not is_adapter(name))
        }
    return state


def _load_model_state(model: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> frozenset[str]:
    """The components of this rank's stages whose scales of delayed FP8 start anew."""
    without_scales: frozenset[str] = frozenset()
    for number, chunk in enumerate(model):
        state = loaded["model"][f"stage {number}"]
        without_scales |= restore_scales(unwrap(chunk), state)
        # strict=False: layers have extra state, which is not in it; reading refuses missing weights.
        unwrap(chunk).load_state_dict(state, strict=False)
    return without_scales


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text[:300]
