"""Weight gradients that are added to the gradient buffer where they are computed, on the CPU.

Otherwise each step allocates a gradient per weight, which the kernel hands out page by page, and then adds it to the
buffer that megatron-core accumulates and reduces: several passes over as much memory as the model takes.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor


class RowwiseEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding whose gradient holds the rows that were looked up, not the whole table.

    The data-parallel wrapper adds it to its dense buffer, so the optimizer sees no difference.
    """

    def forward(self, input_: Tensor) -> Tensor:
        """[B, S] token ids -> [B, S, hidden_size]."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return torch.nn.functional.embedding(input_, self.weight, sparse=True)


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Make the linear layers and embeddings of a model that has gradient buffers use them."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True
        elif type(module) is VocabParallelEmbedding:
            module.__class__ = RowwiseEmbedding
