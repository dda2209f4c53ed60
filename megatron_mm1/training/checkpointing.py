"""Training checkpoints: written whole or not at all, verified when read.

A run's checkpoints lie in `<run_dir>/checkpoints/step-00001000/`: the sharded tensors
(`megatron.core.dist_checkpointing`, SHA-256 of each file in its manifest) and `mm1.json`, which says what the
checkpoint is. A save goes to a temporary name and is renamed once complete; the file `latest` is moved after that.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm1 import __version__
from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import from_dict
from megatron_mm1.errors import UserError
from megatron_mm1.training.build import Model, optimizer_parts, unwrap

FORMAT_VERSION = 1
METADATA = "mm1.json"
LATEST = "latest"

NAMING = {
    "non_homogeneous_layers": True,  # each layer's tensors under its own number, in the tower as in the decoder
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What `mm1.json` holds.

    Attributes:
        iteration: optimizer steps taken.
        consumed_sequences: sequences of the training plan already seen.
        config: the run's configuration.
        tokenizer_fingerprint: SHA-256 of the tokenizer model.
        plan_fingerprint: of the training plan, the order in which sequences are seen.
    """

    iteration: int
    consumed_sequences: int
    config: dict[str, Any]
    tokenizer_fingerprint: str
    plan_fingerprint: str
    format_version: int = FORMAT_VERSION
    code_version: str = __version__

    def mm1_config(self) -> MM1Config:
        """The configuration as it was when the checkpoint was written."""
        return from_dict(self.config)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest complete one in it or in its `checkpoints`.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            target = folder / (folder / LATEST).read_text().strip()
            if (target / METADATA).is_file():
                return target
            raise UserError(
                f"{folder / LATEST} names {target.name}, which is missing or incomplete: "
                f"name another checkpoint of {folder}"
            )
    raise UserError(f"no checkpoint at {path}: expected a folder with {METADATA}, or one with a file {LATEST!r}")


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """Read `mm1.json`.

    Raises:
        UserError: it is damaged or of a newer format.
    """
    try:
        fields = json.loads((checkpoint / METADATA).read_text())
        version = fields["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{checkpoint} has format {version}, newer than this program's {FORMAT_VERSION}: "
                f"upgrade to {fields['code_version']} or later"
            )
        return CheckpointMetadata(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"corrupt checkpoint {checkpoint}: {METADATA} cannot be read ({error})") from error


def save_checkpoint(
    folder: Path,
    metadata: CheckpointMetadata,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    pg_collection: ProcessGroupCollection,
) -> Path:
    """Write a checkpoint into `folder`; every rank takes part and returns when it is in place.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{metadata.iteration:08d}"
    partial = folder / f".{final.name}.partial"
    is_writer = torch.distributed.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    state = _sharded_state(model, optimizer, scheduler, pg_collection=pg_collection, is_loading=False)
    dist_checkpointing.save(state, str(partial), verify_integrity=True, content_metadata=_content_metadata(model))
    if is_writer:
        (partial / METADATA).write_text(json.dumps(asdict(metadata), indent=1))
        _sync_to_disk(partial)
        if final.exists():  # a resumed run passes the same step again
            shutil.rmtree(final)
        partial.rename(final)
        _write_atomically(folder / LATEST, final.name + "\n")
    torch.distributed.barrier()
    return final


def load_weights(checkpoint: Path, model: Sequence[torch.nn.Module], *, pg_collection: ProcessGroupCollection) -> None:
    """Load the weights of a rank's stages into this layout, whatever layout they were saved from.

    Raises:
        UserError: a file is damaged, or tensors are missing or of another shape.
    """
    metadata = {**NAMING, "dp_cp_group": pg_collection.dp_cp}
    state = {"model": _model_state(model, metadata)}
    _load_model_state(model, _read_state(checkpoint, state))


def load_checkpoint(
    checkpoint: Path,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    pg_collection: ProcessGroupCollection,
) -> None:
    """Load weights, optimizer state and schedule, to go on from where the checkpoint was saved.

    Optimizer state loads into the layout it was saved from, its data-parallel size apart.

    Raises:
        UserError: a file is damaged, or tensors are missing or of another shape.
    """
    _fill_state(optimizer)
    loaded = _read_state(
        checkpoint, _sharded_state(model, optimizer, scheduler, pg_collection=pg_collection, is_loading=True)
    )
    _load_model_state(model, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    _separate_steps(optimizer)
    scheduler.load_state_dict(loaded["scheduler"])


def _read_state(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded_state, str(checkpoint), verify_integrity=True)
    except (Exception, CheckpointException) as error:  # which one depends on what is wrong; torch's is no Exception
        raise UserError(f"cannot load checkpoint {checkpoint}: {_first_line(error)}") from error


def _model_state(model: Sequence[torch.nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors by stage of this rank; on disk each has a name of its own, whatever the stages."""
    return {
        f"stage {number}": unwrap(chunk).sharded_state_dict(metadata=metadata) for number, chunk in enumerate(model)
    }


def _load_model_state(model: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    # strict=False: Transformer Engine's modules have extra state that local ones lack; reading refuses missing weights.
    for number, chunk in enumerate(model):
        unwrap(chunk).load_state_dict(loaded["model"][f"stage {number}"], strict=False)


def _content_metadata(model: Model) -> dict[str, Any]:
    """How megatron-core shall name and shard things, the optimizer's state included; kept in the checkpoint."""
    content: dict[str, Any] = dict(NAMING)
    if model[0].ddp_config.use_distributed_optimizer:
        content["distrib_optim_sharding_type"] = "dp_reshardable"
    return content


def _sharded_state(
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    pg_collection: ProcessGroupCollection,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = {**_content_metadata(model), "dp_cp_group": pg_collection.dp_cp}
    model_state = _model_state(model, metadata)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
    }


def _fill_state(optimizer: MegatronOptimizer) -> None:
    """Give a fresh distributed optimizer state to load into: without, megatron-core looks for a step count in vain."""
    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a step counter of its own, with the saved count.

    Loading shares one tensor among all parameters, which every update would then advance, and the distributed optimizer
    fills it from the state it had before, while the saved count lies in the parameter group. Only torch's AdamW counts
    by parameter; Transformer Engine's counts by group, which loads as it is.
    """
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = torch.tensor(float(group.get("step", state["step"])))


def _sync_to_disk(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text[:300]
