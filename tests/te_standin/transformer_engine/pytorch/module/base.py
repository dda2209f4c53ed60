"""What all layers share: what they record, their parameters, the shapes that FP8 refuses."""

import math
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from transformer_engine._release import functions
from transformer_engine.common.recipe import DelayedScaling, Recipe
from transformer_engine.pytorch.quantization import DelayedScalingRecipeState, initialised_in, innermost

(assert_dim_for_fp8_exec,) = functions("pytorch/utils.py", "assert_dim_for_fp8_exec", math=math)


@dataclass(frozen=True)
class Call:
    """A forward pass: what was in force, and the shape of the input."""

    recipe: Recipe | None
    amax_group: ProcessGroup | None
    shape: tuple[int, ...]


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of every layer.

    Attributes:
        te_arguments: of the constructor, by name, defaults included.
        te_initialised_in: the recipe in which its parameters were made; None: in high precision.
        te_calls: its forward passes so far.
    """

    def start(self, arguments: SimpleNamespace) -> None:
        """Begin construction."""
        torch.nn.Module.__init__(self)
        self.te_arguments = {name: value for name, value in vars(arguments).items() if name != "self"}
        self.te_initialised_in = initialised_in()
        self.te_calls: list[Call] = []
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"recipe": None, "fp8_checkpoint": False}

    def record(self, inp: Tensor) -> Recipe | None:
        """Note a forward pass; returns the recipe in force."""
        self._check_types(inp)
        region = innermost()
        self.te_calls.append(Call(region.recipe, region.amax_group, tuple(inp.shape)))
        self.init_fp8_metadata(num_gemms=getattr(self, "num_gemms", 1))
        return region.recipe

    def _check_types(self, inp: Tensor) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError(
                    "Data types for parameters must match when outside of autocasted "
                    f"region. Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}"
                )

    def use_group(self, arguments: SimpleNamespace) -> None:
        """Take the tensor-parallel size from the group, or from the argument where there is none."""
        self.tp_group: ProcessGroup | None = arguments.tp_group
        self.tp_size: int = arguments.tp_size if self.tp_group is None else self.tp_group.size()

    def set_tensor_parallel_group(self, tp_group: ProcessGroup | None) -> None:
        self.tp_group = tp_group

    def add_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        arguments: SimpleNamespace,
        init: Callable[[Tensor], Any] | None,
        *,
        tracked: bool = False,
    ) -> torch.nn.Parameter:
        """Make and initialise a parameter; `tracked`: with the generator that ranks draw different numbers from."""
        dtype = arguments.params_dtype or torch.get_default_dtype()
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=arguments.device))
        self.register_parameter(name, parameter)
        if parameter.device.type != "meta":
            generator: Any = nullcontext()
            if tracked and arguments.get_rng_state_tracker is not None:
                region = getattr(arguments, "rng_tracker_name", None)
                tracker = arguments.get_rng_state_tracker()
                generator = tracker.fork(region) if region else tracker.fork()
            with generator:
                (init or _normal)(parameter)
        return parameter

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Scales of delayed scaling where they are in force. Products are not quantised, so nothing is scaled."""
        self.fp8_meta["recipe"] = recipe = innermost().recipe
        if recipe is not None:
            self.fp8_meta["num_gemms"] = num_gemms
            self.init_fp8_meta_tensors(recipe)

    def init_fp8_meta_tensors(self, recipe: Recipe) -> None:
        """Empty histories; those that there are stay."""
        for key, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            if isinstance(recipe, DelayedScaling) and key not in self.fp8_meta:
                self.fp8_meta[key] = DelayedScalingRecipeState(
                    recipe, num_quantizers=tensors * self.fp8_meta["num_gemms"]
                )

    def note_largest(self, inp: Tensor, weights: Sequence[Tensor]) -> None:
        """Take a pass into the history: of its input and of each weight, agreed on by the ranks of the region."""
        if isinstance(innermost().recipe, DelayedScaling):
            state, count = self.fp8_meta["scaling_fwd"], len(weights)
            largest = torch.zeros_like(state.scale)
            largest[:count] = inp.detach().abs().max() if inp.numel() else 0
            largest[count : 2 * count] = torch.stack([weight.detach().abs().max() for weight in weights])
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=innermost().amax_group)
            state.note(largest)

    def get_extra_state(self) -> Tensor:
        """A pickle, of a recipe with state; of others, and of bf16, nothing."""
        states = {key: value for key, value in self.fp8_meta.items() if isinstance(value, DelayedScalingRecipeState)}
        if not states or self.fp8_meta["recipe"] is None:
            return torch.empty(0, dtype=torch.uint8)
        pickled = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": {}}
        for key, state in states.items():
            direction = key.removeprefix("scaling_")
            pickled |= {f"scale_{direction}": state.scale, f"amax_history_{direction}": state.amax_history}
        return torch.frombuffer(bytearray(pickle.dumps(pickled)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel() > 0:
            raise RuntimeError(f"Refusing to load pickled Transformer Engine extra state for {type(self).__name__}.")


def _normal(weight: Tensor) -> None:
    torch.nn.init.normal_(weight, mean=0.0, std=0.023)


def mark_parallel(tensor: Tensor, dim: int) -> None:
    """The attributes by which megatron-core knows that ranks hold slices."""
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    tensor.partition_dim = dim  # type: ignore[attr-defined]
    tensor.partition_stride = 1  # type: ignore[attr-defined]


def check_product(recipe: Recipe | None, rows: int, weight: Tensor) -> None:
    """Raise where FP8 products of [rows, in] with [out, in] do.

    The three products of a layer (output, input gradient, weight gradient) have each of the three sizes as a leading
    dimension, which cuBLAS wants in multiples of 16 bytes (common/gemm/cublaslt_gemm.cu).
    """
    if recipe is None:
        return
    for name, size in zip(("rows", "out_features", "in_features"), (rows, *weight.shape), strict=True):
        if size % 16:
            raise RuntimeError(
                f"Leading dimension requirement on A for FP8 GEMM. Caller must pad. ({name} = {size} in {recipe})"
            )


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """What takes the place of a weight gradient that was added to main_grad already."""
    return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)
