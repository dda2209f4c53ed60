"""AdaFactor (Shazeer and Stern, 2018) with given learning rates, for parameters that tensor-parallel ranks share.

The second moments of a matrix are kept as one row and one column: the means of the squared gradient over the other
dimension. Where ranks share a matrix these means, and the root mean square that limits its update, are over the whole
of it, so every layout takes the same step. A sum goes around once for all of a rank's parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

ROW, COLUMN, WHOLE = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"
"""What is kept of a parameter: means over the last dimension and over the one before, or, where it has fewer than two
dimensions, its squared gradient. Further dimensions, in front, are so many matrices."""


def split_dimension(parameter: Tensor) -> int | None:
    """Which dimension of a parameter tensor-parallel ranks share, counted from the end (-1 the last); None: none."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim) - parameter.dim()  # type: ignore[attr-defined]


@dataclass
class _Update:
    """What a step finds out about one parameter.

    Attributes:
        squares: the squared gradient's means, by what is kept.
        row_mean: of the mean row, for each matrix.
        sum_of_squares: of the update before it is limited.
    """

    parameter: torch.nn.Parameter
    group: dict[str, Any]
    state: dict[str, Tensor]
    squares: dict[str, Tensor]
    row_mean: Tensor | None = None
    sum_of_squares: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad.float()

    def direction(self) -> Tensor:
        """The gradient over the root of its second moments."""
        if self.row_mean is None:
            return self.gradient * self.state[WHOLE].rsqrt()
        row = (self.state[ROW] / self.row_mean).rsqrt().unsqueeze(-1)
        return self.gradient * row * self.state[COLUMN].unsqueeze(-2).rsqrt()


class AdaFactor(torch.optim.Optimizer):
    """Equal to transformers' Adafactor(scale_parameter=False, relative_step=False) on whole parameters. Weight decay
    is decoupled and multiplied by the learning rate.

    Args:
        params: parameters or groups of them, float32; `tensor_model_parallel` and `partition_dim` of each are read.
        tp_group: the ranks that share those that are split.
        decay_rate, eps, clip_threshold: see `OptimizerConfig`.
    """

    def __init__(
        self, params: Any, *, tp_group: ProcessGroup, decay_rate: float, eps: float, clip_threshold: float
    ) -> None:
        defaults = dict(lr=0.0, weight_decay=0.0, decay_rate=decay_rate, eps=eps, clip_threshold=clip_threshold)
        super().__init__(params, defaults)
        self._tp_group = tp_group

    def fill_state(self) -> None:
        """Zeros in the place of each parameter's state, where it has none."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                if not self.state[parameter]:
                    shapes = {WHOLE: parameter.shape}
                    if parameter.dim() >= 2:
                        shapes = {ROW: parameter.shape[:-1], COLUMN: parameter.shape[:-2] + parameter.shape[-1:]}
                    for kind, shape in shapes.items():
                        self.state[parameter][kind] = torch.zeros(shape, device=parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; every rank of `tp_group` calls it, with gradients of the same parameters."""
        assert closure is None
        self.fill_state()
        updates = [self._begin(parameter, group) for group, parameter in self._with_gradients()]
        self._average_squares(updates)
        for update in updates:
            decay = 1.0 - update.group["step"] ** update.group["decay_rate"]
            for kind, fresh in update.squares.items():
                update.state[kind].mul_(decay).add_(fresh, alpha=1.0 - decay)
            if ROW in update.state:
                update.row_mean = update.state[ROW].mean(dim=-1, keepdim=True)
        self._average([u.row_mean for u in updates if u.row_mean is not None and split_dimension(u.parameter) == -2])
        for update in updates:
            update.sum_of_squares = update.direction().square().sum()
        split = [update for update in updates if split_dimension(update.parameter) is not None]
        self._average([update.sum_of_squares for update in split if update.sum_of_squares is not None])
        for update in updates:
            self._apply(update)

    def _with_gradients(self) -> list[tuple[dict[str, Any], torch.nn.Parameter]]:
        found = []
        for group in self.param_groups:
            group["step"] += 1
            found += [(group, parameter) for parameter in group["params"] if parameter.grad is not None]
        return found

    def _begin(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> _Update:
        update = _Update(parameter, group, self.state[parameter], {})
        squares = update.gradient.square().add_(group["eps"])
        update.squares = {WHOLE: squares}
        if parameter.dim() >= 2:
            update.squares = {ROW: squares.mean(dim=-1), COLUMN: squares.mean(dim=-2)}
        return update

    def _average_squares(self, updates: Sequence[_Update]) -> None:
        """Means over a dimension of which each rank has a part."""
        along = {-1: ROW, -2: COLUMN}
        kinds = [(update, along.get(split_dimension(update.parameter) or 0)) for update in updates]
        self._average([update.squares[kind] for update, kind in kinds if kind in update.squares])

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in one collective."""
        if not tensors or self._tp_group.size() == 1:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(together, group=self._tp_group)
        together /= self._tp_group.size()
        for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    @staticmethod
    def _apply(update: _Update) -> None:
        # Each rank's part is as large as any other's, and their sums were averaged: so are both numbers of this mean.
        assert update.sum_of_squares is not None
        parameter, group = update.parameter, update.group
        size = (update.sum_of_squares / parameter.numel()).sqrt() / group["clip_threshold"]
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.sub_(update.direction().mul_(group["lr"] / size.clamp(min=1.0)))
