"""What the workers of test_memory.py run."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer

from megatron_mm1.config import MM1Config
from tests.parallel.jobs import Run


def held_by_rank(config: MM1Config) -> dict[str, int]:
    """After a step on the corpus: parameters of this rank, and bytes of its gradient buffers and optimizer state."""
    run = Run(config)
    run.step(next(run.corpus_batches()))
    held = {
        "pipeline_rank": run.groups.pp.rank(),
        "parameters": sum(parameter.numel() for chunk in run.model for parameter in chunk.parameters()),
        "gradients": sum(
            buffer.grad_data.nbytes for chunk in run.model for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ),
        "optimizer": sum(tensor.nbytes for tensor in _state(run.optimizer)),
    }
    run.close()
    return held


def _state(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments, and in bf16 master weights, of megatron-core's wrapped optimizers."""
    for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if one.optimizer is None:  # nothing of this kind on this rank
            continue
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
        for groups in (
            getattr(one, "fp32_from_float16_groups", []),
            getattr(one, "shard_fp32_from_float16_groups", []),
        ):
            yield from (tensor for group in groups for tensor in group if tensor is not None)
