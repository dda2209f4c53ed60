"""What the workers of the checkpoint tests run."""

import hashlib
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel

from megatron_mm1.checkpoint.format import CheckpointMetadata, read_metadata
from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.errors import UserError
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.parity.harness import parity_config
from megatron_mm1.training.optimizer_state import steps_taken
from megatron_mm1.training.saving import CheckpointSaver, save_checkpoint
from tests.parallel.jobs import Run, with_parallel

TINY = [
    *("--model.decoder.num_layers", "4", "--model.decoder.hidden_size", "32", "--model.decoder.ffn_hidden_size", "48"),
    *(
        "--vocab_size",
        "128",
        "--seq_length",
        "64",
        "--model.vision.hidden_size",
        "32",
        "--model.vision.num_layers",
        "2",
    ),
    *("--model.vision.ffn_hidden_size", "48", "--model.connector.hidden_size", "16"),
    *("--parallel.expert_model_parallel_size", "1"),
]
MODELS = {
    "dense": ["--preset", "mm1-tiny", *TINY],
    "dense bf16": ["--preset", "mm1-tiny", *TINY, "--training.precision", "bf16"],
    "experts": ["--preset", "mm1-tiny-moe", *TINY],
    "experts bf16": ["--preset", "mm1-tiny-moe", *TINY, "--training.precision", "bf16"],
}


def config_of(model: str, options: str = "") -> MM1Config:
    """A tiny model in one process unless options say otherwise."""
    pairs = (option.partition("=")[::2] for option in options.split())
    sizes = {name: int(value) if value.isdigit() else value or True for name, value in pairs}
    return with_parallel(parity_config(MODELS[model]), **sizes)


def metadata_of(config: MM1Config, iteration: int) -> CheckpointMetadata:
    return CheckpointMetadata(
        iteration=iteration,
        consumed_sequences=iteration * config.training.global_batch_size,
        config=to_dict(config),
        tokenizer_fingerprint="",
        plan_fingerprint="",
        world_size=torch.distributed.get_world_size(),
    )


def steps(run: Run, count: int) -> list[float]:
    batches = run.share(synthetic_batches(run.config, "mixed"))
    return [run.step(batches)["loss"] for _ in range(count)]


def train_and_save(config: MM1Config, folder: Path) -> tuple[Path, list[float]]:
    """A checkpoint after two steps, and the losses of three more."""
    run = Run(config)
    steps(run, 2)
    path = save_checkpoint(folder, metadata_of(config, 2), run.state())
    losses = steps(run, 3)
    run.close()
    return path, losses


def resume(config: MM1Config, checkpoint: Path) -> tuple[list[float], int]:
    """The losses of three steps from a checkpoint, and how many Adam has counted before them."""
    run = Run(config)
    run.load(checkpoint)
    counted = steps_taken(run.optimizer)
    losses = steps(run, 3)
    run.close()
    return losses, counted


def save_again(config: MM1Config, checkpoint: Path, folder: Path) -> Path:
    """What a layout writes of what it has read."""
    run = Run(config)
    run.load(checkpoint)
    path = save_checkpoint(folder, metadata_of(config, 2), run.state())
    run.close()
    return path


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """In one process: every tensor of a checkpoint by name, and the step count."""
    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    common = dist_checkpointing.serialization.load_common_state_dict(str(checkpoint))
    return {**tensors, "optimizer_steps": torch.tensor(common["optimizer_steps"])}


def save_while_training(config: MM1Config, folder: Path, *, delay: float) -> dict[str, Any]:
    """Save in the background while training goes on, with files that take `delay` seconds to write.

    Returns:
        path: of the checkpoint that was under way while three steps were taken.
        reference: of one that was written while nothing else happened, from the same state.
        steps_meanwhile: how many steps were over before the first was in place.
    """
    from megatron_mm1.training import saving

    run = Run(config)
    steps(run, 2)
    reference = save_checkpoint(folder / "reference", metadata_of(config, 2), run.state())
    write = saving._Strategy.write

    def slow_write(strategy: saving._Strategy) -> list[Any]:
        time.sleep(delay)
        return write(strategy)

    saving._Strategy.write = slow_write  # type: ignore[method-assign]
    try:
        saver = CheckpointSaver(folder / "meanwhile", asynchronous=True)
        saver.save(metadata_of(config, 2), run.state())
        meanwhile = 0
        while not (folder / "meanwhile" / "latest").exists() and meanwhile < 1000:
            steps(run, 1)
            saver.poll()
            meanwhile += 1
        saver.wait()
    finally:
        saving._Strategy.write = write  # type: ignore[method-assign]
    run.close()
    return {"path": folder / "meanwhile" / "step-00000002", "reference": reference, "steps_meanwhile": meanwhile}


def save_several(
    config: MM1Config, folder: Path, iterations: list[int], options: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Save after "iterations", a step between each; the lines said, and the error that ended it, if one did."""
    said: list[str] = []
    errors = []
    run = Run(config)
    saver = CheckpointSaver(folder, say=said.append, **options)
    try:
        for iteration in iterations:
            steps(run, 1)
            saver.save(metadata_of(config, iteration), run.state())
            saver.poll()
        saver.wait()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
    run.close()
    return said, errors


def draws_after_resuming(config: MM1Config, folder: Path) -> tuple[list[float], list[float]]:
    """Random numbers drawn after a save, and again after loading it."""

    def draw() -> list[float]:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = float(torch.rand(()))
        return [random.random(), float(np.random.rand()), float(torch.rand(())), tracked]

    run = Run(config)
    draw()
    path = save_checkpoint(folder, metadata_of(config, 2), run.state())
    before = draw()
    draw()
    run.load(path)
    after = draw()
    run.close()
    return before, after


def digest(run: Run) -> str:
    """Of everything that a checkpoint of this process keeps."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = run.state()
    apply_factories(state)
    hashed = hashlib.sha256(str(state["optimizer_steps"]).encode())
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    for part in sorted(parts, key=lambda part: (part.key, part.global_offset)):
        assert part.data is not None
        hashed.update(part.key.encode() + part.data.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def read_config(checkpoint: Path) -> MM1Config:
    return read_metadata(checkpoint).mm1_config()


def error_of_loading(config: MM1Config, checkpoint: Path) -> str:
    run = Run(config)
    try:
        run.load(checkpoint)
    except UserError as error:
        return str(error)
    finally:
        run.close()
    return ""


def save_where_rank_1_fails(config: MM1Config, folder: Path) -> tuple[list[str], list[str]]:
    """As `save_several`, where only one rank's disk refuses."""
    from megatron_mm1.training import saving

    write = saving._Strategy.write

    def refuse(strategy: saving._Strategy) -> list[Any]:
        raise OSError("Input/output error")

    if torch.distributed.get_rank() == 1:
        saving._Strategy.write = refuse  # type: ignore[method-assign]
    try:
        return save_several(config, folder, [1], {})
    finally:
        saving._Strategy.write = write  # type: ignore[method-assign]
