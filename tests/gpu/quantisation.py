"""What FP8 does to a product, worked out with torch's own FP8 types: the reference for the error of each recipe.

The operands of a linear layer's three products are rounded to e4m3 or e5m2 after scaling, and multiplied exactly. What
Transformer Engine adds to that, accumulation in float32 and a rounding of the result to bf16, is small beside it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Quantiser:
    """Rounds tensors as an FP8 recipe does.

    Attributes:
        recipe: "fp8_delayed" (its scales those of the same data), "fp8_tensorwise" or "fp8_blockwise".
        gradients: the type of gradients; inputs and weights are e4m3 in every recipe.
    """

    recipe: str
    gradients: torch.dtype = E5M2

    @classmethod
    def of(cls, recipe: str) -> "Quantiser":
        """As Transformer Engine's recipes are by default: hybrid, and e4m3 throughout for blocks."""
        return cls(recipe, E4M3 if recipe == "fp8_blockwise" else E5M2)

    def weight(self, weight: Tensor) -> Tensor:
        """[out, in], blocks of 128 x 128."""
        if self.recipe != "fp8_blockwise":
            return rounded(weight, E4M3)
        rows = weight.split(BLOCK)
        return torch.cat([torch.cat([rounded(tile, E4M3) for tile in row.split(BLOCK, dim=1)], dim=1) for row in rows])

    def input(self, x: Tensor) -> Tensor:
        """[.., in], blocks of 1 x 128."""
        return self._rows(x, E4M3)

    def gradient(self, x: Tensor) -> Tensor:
        """[.., out], blocks of 1 x 128."""
        return self._rows(x, self.gradients)

    def _rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.recipe != "fp8_blockwise":
            return rounded(x, dtype)
        return torch.cat([rounded(part, dtype, by_row=True) for part in x.split(BLOCK, dim=-1)], dim=-1)


def rounded(x: Tensor, dtype: torch.dtype, *, by_row: bool = False) -> Tensor:
    """`x` after rounding to an FP8 type, scaled so that the largest value becomes the type's."""
    largest = x.abs().amax(dim=-1, keepdim=True) if by_row else x.abs().amax()
    scale = torch.finfo(dtype).max / largest.clamp(min=1e-30)
    return (x * scale).float().to(dtype).to(x.dtype) / scale


@contextmanager
def quantised(model: torch.nn.Module, quantiser: Quantiser, *, under: tuple[str, ...]) -> Iterator[None]:
    """Let the local backend's linear layers compute with rounded operands while the block lasts; weights stay rounded.

    Args:
        under: parts of the names of the layers that do.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1].startswith("linear_") and any(part in name for part in under):
                module.weight.data.copy_(quantiser.weight(module.weight.data))
                before, after = _hooks(quantiser)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        yield


def _hooks(quantiser: Quantiser) -> tuple[Any, Any]:
    def before(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_Rounded.apply(args[0], quantiser), *args[1:])

    def after(module: torch.nn.Module, args: Any, result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return (_RoundedGradient.apply(result[0], quantiser), *result[1:])

    return before, after


class _Rounded(torch.autograd.Function):
    """Rounds on the way forward only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantiser: Quantiser) -> Tensor:
        return quantiser.input(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundedGradient(torch.autograd.Function):
    """Rounds on the way back only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantiser: Quantiser) -> Tensor:
        ctx.quantiser = quantiser
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.quantiser.gradient(gradients[0]), None


def linear_with_gradients(
    x: Tensor, weight: Tensor, gradient: Tensor, *, quantiser: Quantiser | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x weight^T: the output, and the gradients of x and weight, from [M, K], [N, K] and the output's [M, N].

    With a quantiser all operands are rounded.
    """
    if quantiser is not None:
        x, weight, gradient = quantiser.input(x), quantiser.weight(weight), quantiser.gradient(gradient)
    return x @ weight.T, gradient @ weight, gradient.T @ x
