"""What the workers of test_conversion run."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.config import MM1Config, ParallelConfig
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.training.build import build_module, component_of, unwrap
from megatron_mm1.training.checkpointing import load_weights
from megatron_mm1.training.saving import save_checkpoint
from tests.parallel.jobs import Run
from tests.parallel.saving_jobs import metadata_of


def config_in(folder: Path, **sizes: Any) -> MM1Config:
    """A checkpoint's configuration in a layout."""
    config = read_metadata(find_checkpoint(folder)).mm1_config()
    return dataclasses.replace(config, parallel=ParallelConfig(**sizes))


def save_from_layout(folder: Path, sizes: dict[str, Any], output: Path) -> Path:
    """What a run in some layout saves of the weights that it began with."""
    config = config_in(folder, **sizes)
    run = Run(config)
    run.load_weights(find_checkpoint(folder))
    path = save_checkpoint(output, metadata_of(config, 0), run.state())
    run.close()
    return path


@torch.no_grad()
def logits(folder: Path, sizes: dict[str, Any], batches: list[PackedBatch]) -> list[Tensor]:
    """Logits [B, S, vocabulary] of each batch, from the last pipeline stage; of other stages nothing."""
    config = config_in(folder, **sizes)
    groups = build_process_groups(config.parallel, seed=1)
    module = build_module(config, backend="local", pg_collection=groups).eval()
    load_weights(find_checkpoint(folder), [module], pg_collection=groups)
    model, results = unwrap(module), []
    for batch in batches:
        if not model.pre_process:
            received = torch.empty(batch.tokens.numel(), 1, config.model.decoder.hidden_size)
            torch.distributed.recv(received, group_src=groups.pp.rank() - 1, group=groups.pp)
            model.set_input_tensor([received])
        output = module(batch, return_logits=True)
        if model.post_process:
            results.append(output)
        else:
            torch.distributed.send(output, group_dst=groups.pp.rank() + 1, group=groups.pp)
    destroy_process_groups()
    return results


def start_from_part(folder: Path) -> tuple[tuple[str, ...], set[str]]:
    """(parts that a checkpoint lacks, parts of the model that loading it changed)."""
    config = config_in(folder)
    groups = build_process_groups(config.parallel, seed=1)
    module = build_module(config, backend="local", pg_collection=groups)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    missing = load_weights(find_checkpoint(folder), [module], pg_collection=groups)
    changed = {
        component_of(name) for name, weight in module.named_parameters() if not torch.equal(weight, before[name])
    }
    destroy_process_groups()
    return missing, changed
