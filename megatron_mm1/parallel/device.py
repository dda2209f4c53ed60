"""Which device and layer backend this process runs on, decided before megatron-core is imported."""

import importlib.util
import logging
import os
import sys
import warnings
from functools import cache

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import fp8_recipes, uses_fp8
from megatron_mm1.errors import UserError
from megatron_mm1.parallel import cpu

_INNER_WARNINGS = (
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    "The argument order of load has been changed",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "If you are using transformer_engine as the transformer implementation",
)
"""About how megatron-core calls itself or torch: nothing that a user of ours does or could change."""

_INNER_MESSAGE = "DistributedDataParallel: full_param_layout not provided"
"""The same, in megatron-core's log."""


@cache
def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used here; None where it can.

    A partial or CUDA-less Transformer Engine raises more than ImportError, the only thing megatron-core catches, and
    a complete one replaces megatron-core's optimizers by CUDA ones. So where it cannot work it is made to look
    absent.
    """
    problem = "no CUDA device"
    if torch.cuda.is_available():
        try:
            import transformer_engine.pytorch  # noqa: F401

            return None
        except Exception as error:  # RuntimeError, FileNotFoundError, OSError, AssertionError have all been seen
            problem = f"{type(error).__name__}: {error}"
    for name in ("transformer_engine", "transformer_engine_torch"):
        for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[loaded]
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import` raise ImportError
    return problem


@cache
def has_weight_gradient_kernel() -> bool:
    """Whether apex's kernel is here that adds a weight's gradient to the gradient buffer in the product."""
    if not torch.cuda.is_available():  # the module is then ours, for layers that are told to use it
        return False
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@cache
def prepare() -> None:
    """Ready the process for megatron-core. Idempotent."""
    # Read when CUDA starts: lets megatron-core's collectives overlap with the products they wait for.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if transformer_engine_problem():
        # megatron-core says so in six places on import; `transformer_engine_problem` says it once, with the reason.
        warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning)
    for about_megatron_core_itself in _INNER_WARNINGS:
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=about_megatron_core_itself, category=category)
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
        lambda record: _INNER_MESSAGE not in record.getMessage()
    )
    if not torch.cuda.is_available():
        cpu.install()


def device() -> torch.device:
    """The device this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def layer_backend(config: MM1Config) -> str:
    """Resolve `training.layer_backend` to "transformer_engine" or "local".

    Raises:
        UserError: Transformer Engine is asked for, or FP8 layers are, which only it has, where it cannot work.
    """
    requested, problem = config.training.layer_backend, transformer_engine_problem()
    if config.training.precision == "fp32":
        problem = problem or "its attention on packed sequences takes no float32"
    if requested == "local":
        return "local"
    if not problem:
        return "transformer_engine"
    if requested == "transformer_engine":
        raise UserError(
            "training.layer_backend is transformer_engine, but Transformer Engine cannot be used "
            f"({problem}): use local"
        )
    if uses_fp8(config.fp8):
        in_fp8 = ", ".join(f"fp8.{name}_recipe" for name, recipe in fp8_recipes(config.fp8).items() if recipe != "bf16")
        raise UserError(
            f"{in_fp8} ask for FP8 layers, but Transformer Engine, whose they are, cannot be used ({problem}): "
            "set them to bf16"
        )
    return "local"
