"""What the worker processes of the training tests run: one on the GPU, another that sees none."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_mm1.config import MM1Config
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.parallel.device import device
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.training import trainer
from megatron_mm1.training.build import build_module, unwrap
from megatron_mm1.training.checkpointing import load_weights
from megatron_mm1.training.resume import starting_point
from tests.canonical import canonical_state
from tests.parallel.jobs import save_initial

__all__ = ["checkpoint_weights", "device_type", "save_initial", "train"]


def device_type() -> str:
    return device().type


def train(config: MM1Config, backend: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train as users do, from the checkpoint that `config` names or the run's own newest.

    Returns:
        The loss of each step that the run folder has, and the weights at the end.
    """
    tokenizer = open_tokenizer(config.data.tokenizer)
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    start = starting_point(config, tokenizer)
    run = trainer.Run(config, backend=backend, tokenizer=tokenizer, start=start, groups=groups)
    run.train()
    weights = canonical_state(unwrap(run.progress.model[0]), groups)
    destroy_process_groups()
    records = map(json.loads, (Path(config.run_dir) / "log.jsonl").read_text().splitlines())
    return [record["lm_loss"] for record in records if record["kind"] == "train"], weights


def checkpoint_weights(config: MM1Config, checkpoint: Path) -> dict[str, Tensor]:
    """The weights that a new model has after loading them, by the names they have in checkpoints."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=99))
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    model = build_module(config, backend="local", pg_collection=groups)
    torch.nn.init.zeros_(next(model.parameters()))
    load_weights(checkpoint, [model], pg_collection=groups)
    weights = canonical_state(unwrap(model), groups)
    destroy_process_groups()
    return weights
