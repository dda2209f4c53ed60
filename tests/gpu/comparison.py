"""Outputs and gradients of a model, and how far they are from those of another in float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.parity.shards import shards, whole_tensors
from megatron_mm1.training.build import unwrap

BF16_ROUNDING = torch.finfo(torch.bfloat16).eps / 2
"""Largest relative error of one rounding to bf16."""

Computation = Callable[[MM1Model], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a computation gave, on the host.

    Attributes:
        output: float64.
        gradients: of sum(output * cotangent) with respect to each parameter, float32, by its name in checkpoints.
    """

    output: Tensor
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """||x - reference|| / ||reference|| of the output, and of the gradient of each parameter."""

    output: float
    gradients: Mapping[str, float]


def outcome(model: Any, compute: Computation, groups: ProcessGroupCollection, *, repeats: int = 1) -> Outcome:
    """Run `compute` on a model and differentiate the sum of its result times fixed random numbers.

    Args:
        model: bare, whose gradients are then in `grad`, or wrapped for data parallelism (`main_grad`).
        compute: from the MM1Model to a tensor.
        repeats: how often; the last time counts. Delayed scaling has its scales from the time before.
    """
    wrapped = model is not unwrap(model)
    for _ in range(repeats):
        if wrapped:
            model.zero_grad_buffer()
        model.zero_grad(set_to_none=True)
        output = compute(unwrap(model))
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(output.shape, generator=generator).to(output)
        (output * cotangent).sum().backward()
    gradient = (lambda parameter: parameter.main_grad) if wrapped else _gradient
    return Outcome(
        output=output.detach().double().cpu(),
        gradients=whole_tensors(shards([model], gradient, pg_collection=groups)),
    )


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def errors(got: Outcome, reference: Outcome) -> Errors:
    """Relative errors; the two must have the same parameters."""
    assert got.gradients.keys() == reference.gradients.keys()
    return Errors(
        output=relative_error(got.output, reference.output),
        gradients={name: relative_error(got.gradients[name], of) for name, of in reference.gradients.items()},
    )


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; infinite for numbers that are not finite or where the reference is zero and x
    is not."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    assert x.shape == reference.shape, f"{tuple(x.shape)} beside {tuple(reference.shape)}"
    difference, norm = float((x - reference).norm()), float(reference.norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm and difference < float("inf") else float("inf")


def assert_no_worse(got: Errors, than: Errors, *, factor: float, floor: float = BF16_ROUNDING) -> None:
    """Every error is at most `factor` times the other's, or at most `floor`; says which is not."""
    limits = {name: max(factor * error, floor) for name, error in _named(than).items()}
    worse = {
        name: f"{error:.2e} > {limits[name]:.2e}" for name, error in _named(got).items() if not error <= limits[name]
    }
    assert not worse, worse


def _named(of: Errors) -> dict[str, float]:
    return {"output": of.output, **of.gradients}
