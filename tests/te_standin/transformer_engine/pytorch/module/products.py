"""y = x W^T, with the communication of tensor parallelism around it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    assert_dim_for_fp8_exec,
    check_product,
    get_dummy_wgrad,
    mark_parallel,
)


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    whole = x.new_empty(len(x) * group.size(), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    part = x.new_empty(len(x) // group.size(), *x.shape[1:])
    torch.distributed.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


class _Communicate(torch.autograd.Function):
    """One collective forward, another backward; None is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Any, backward: Any, group: ProcessGroup) -> Tensor:
        ctx.communicate, ctx.group = backward, group
        return forward(x, group) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.communicate(gradient, ctx.group) if ctx.communicate else gradient, None, None, None


class _FusedAccumulation(torch.autograd.Function):
    """A product whose weight gradient is added to weight.main_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: torch.nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        weight.main_grad.add_(gradient.flatten(0, -2).t() @ x.flatten(0, -2))
        dummy = None
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            dummy = get_dummy_wgrad(list(weight.shape), weight.dtype, zero=True)
        return gradient @ weight, dummy


def product(x: Tensor, weight: torch.nn.Parameter, *, fuse_wgrad_accumulation: bool) -> Tensor:
    if fuse_wgrad_accumulation and weight.requires_grad:
        return _FusedAccumulation.apply(x, weight)
    return x @ weight.t()


class ParallelProduct(TransformerEngineBaseModule):
    """Weight, bias and communication of Linear and LayerNormLinear."""

    def make_product(self, arguments: SimpleNamespace) -> None:
        self.use_group(arguments)
        self.in_features, self.out_features = arguments.in_features, arguments.out_features
        self.parallel_mode = arguments.parallel_mode
        match self.parallel_mode:
            case "column":
                self.out_features = _divide(self.out_features, self.tp_size)
            case "row":
                self.in_features = _divide(self.in_features, self.tp_size)
            case mode:
                assert mode is None, f"parallel_mode {mode} not supported"
        self.sequence_parallel = self.tp_size > 1 and arguments.sequence_parallel
        self.fuse_wgrad_accumulation = arguments.fuse_wgrad_accumulation
        self.use_bias, self.return_bias = arguments.bias, arguments.return_bias
        weight = self.add_parameter(
            "weight", (self.out_features, self.in_features), arguments, arguments.init_method, tracked=True
        )
        mark_parallel(weight, 1 if self.parallel_mode == "row" else 0)
        if not self.use_bias:
            self.bias: Any = torch.empty(0, dtype=weight.dtype)
            return
        bias = self.add_parameter("bias", (self.out_features,), arguments, torch.nn.init.zeros_)
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif self.parallel_mode == "column":
            mark_parallel(bias, 0)

    def check(self, inp: Tensor, recipe: Recipe | None) -> None:
        """Raise where the release does, of the input as it comes, and where cuBLAS does, of the gathered one."""
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        if self.tp_size > 1 and self.tp_group is None:
            raise RuntimeError("Tensor parallel group not initialized.")
        if recipe is None:
            return
        assert_dim_for_fp8_exec(inp, self.weight)
        rows = inp.numel() // inp.shape[-1]
        gathered = self.parallel_mode == "column" and self.sequence_parallel
        check_product(recipe, rows * self.tp_size if gathered else rows, self.weight)

    def multiply(self, x: Tensor) -> Any:
        """What `forward` returns, of the (normalised) input."""
        self.note_largest(x, [self.weight])
        group = self.tp_group if self.tp_size > 1 else None
        if group is not None and self.parallel_mode == "column":
            x = (
                _Communicate.apply(x, _all_gather, _reduce_scatter, group)
                if self.sequence_parallel
                else _Communicate.apply(x, None, _all_reduce, group)
            )
        output = product(x, self.weight, fuse_wgrad_accumulation=self.fuse_wgrad_accumulation)
        if group is not None and self.parallel_mode == "row":
            output = (
                _Communicate.apply(output, _reduce_scatter, _all_gather, group)
                if self.sequence_parallel
                else _Communicate.apply(output, _all_reduce, None, group)
            )
        if self.use_bias and not self.return_bias:
            output = output + self.bias
        return (output, self.bias) if self.return_bias else output


def _divide(size: int, parts: int) -> int:
    assert size % parts == 0, f"{size} is not divisible by {parts}"
    return size // parts
