"""Tensor-parallel linear layers of the local backend."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.functional import linear


class LocalColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's; without gradients it is the product alone: what megatron-core does around it takes longer than
    the product of a single position.
    """

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's."""
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if torch.is_grad_enabled() or self.sequence_parallel or gathers or weight is not None:
            return super().forward(input_, weight, runtime_gather_output)
        bias, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return linear(input_, self.weight, bias), left


class LocalRowParallelLinear(RowParallelLinear):
    """As `LocalColumnParallelLinear`."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's."""
        if torch.is_grad_enabled() or self.sequence_parallel or not self.input_is_parallel:
            return super().forward(input_)
        output = linear(input_, self.weight)
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(output, group=self.tp_group)
        if self.skip_bias_add:
            return output, self.bias
        return (output if self.bias is None else output.add_(self.bias)), None
