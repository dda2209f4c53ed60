"""megatron-core 0.19 on a machine without a CUDA device.

megatron-core names CUDA in a few places. Each entry below makes one of them mean the CPU; none changes what is
computed. Installed only where no CUDA device exists (see `device.prepare`), before megatron-core is imported.
"""

import functools
import logging
import os
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.utils._device import _device_constructors

from megatron_mm1.parallel.cpu_kernels import add_weight_gradient, rotate

_CPU = torch.device("cpu")


class _InertStream:
    """Stands in for a CUDA stream or event: on the CPU every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "_InertStream":
        return self


@contextmanager
def _inert_context(stream: Any) -> Any:
    yield


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with a literal device="cuda" read as the CPU, and without pinned memory, which is a GPU driver's."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _silence(logger: str, message: str) -> None:
    """Drop one message of a logger that is about CUDA alone."""
    logging.getLogger(logger).addFilter(lambda record: message not in record.getMessage())


def _install_runtime() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU  # used as `device=torch.cuda.current_device()`
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None  # called when buffers are freed
    cuda.memory_allocated = lambda device=None: 0
    cuda.max_memory_allocated = lambda device=None: 0
    cuda.Stream = cuda.Event = _InertStream
    cuda.current_stream = cuda.default_stream = lambda device=None: _InertStream()
    cuda.stream = _inert_context
    cuda.is_current_stream_capturing = lambda: False
    _silence("torch.utils.cpp_extension", "No CUDA runtime is found")
    _silence("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _install_rng() -> None:
    """The one CPU generator takes the place of the device's: the model-parallel RNG tracker saves and restores it."""

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    # torch.manual_seed calls torch.cuda.manual_seed_all, hence the generator itself here.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    # The tracker warns when the CPU's generator moved while it had the device's in use; here they are one.
    _silence("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")


def _install_factories() -> None:
    # `with torch.device(..)` knows factories by identity and lists them once: let that be the originals, which are what
    # reaches it. Otherwise transformers' from_pretrained, which builds on the meta device, leaves buffers unset.
    _device_constructors()
    for name in ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_to = torch.Tensor.to

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.to = to


def _install_tensor_types() -> None:
    """The optimizers and gradient clipping compare Tensor.type() with "torch.cuda.FloatTensor" and its half-precision
    kin.
    """
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def named_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = named_as_cuda
    torch.cuda.FloatTensor = torch.FloatTensor


def _install_collectives() -> None:
    """gloo's all_to_all_single takes split sizes as lists, and the token dispatcher passes tensors; gloo gathers and
    scatters equal sizes only, and experts that several ranks share get as many tokens as each has."""
    all_to_all_single = torch.distributed.all_to_all_single

    def as_list(sizes: Any) -> list[int] | None:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all_single)
    def with_lists(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        return all_to_all_single(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)

    torch.distributed.all_to_all_single = with_lists
    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @functools.wraps(all_gather)
    def all_gather_unequal(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        most = max(len(part) for part in tensor_list) if tensor.dim() else 0
        if all(len(part) == most for part in tensor_list if part.dim()):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group=group)
        for part, whole in zip(tensor_list, gathered, strict=True):
            part.copy_(whole[: len(part)])
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_unequal(output: Any, input_list: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if len({len(part) for part in input_list}) == 1:
            return reduce_scatter(output, input_list, *args, group=group, **kwargs)
        total = torch.cat(list(input_list))
        torch.distributed.all_reduce(total, group=group)
        mine = torch.distributed.get_rank(group)
        output.copy_(total.split([len(part) for part in input_list])[mine])
        return None

    torch.distributed.all_gather = all_gather_unequal
    torch.distributed.reduce_scatter = reduce_scatter_unequal


def _install_gloo_devices() -> None:
    """Let all gloo groups of a process share one device.

    Each device has a thread that wakes up a hundred times a second. A layout has tens of groups, and with a device each
    the threads of eight processes alone keep two cores busy.
    """
    gloo = torch.distributed.ProcessGroupGloo
    make = gloo.__init__
    devices: list[Any] = []

    def with_shared_device(group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        if not devices:
            interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
            devices.extend(gloo.create_device(interface=name) for name in interfaces.split(",") if name)
            devices.extend([] if devices else [gloo.create_default_device()])
        options = gloo._Options()
        options._devices, options._threads, options._timeout = devices, 2 * len(devices), timeout
        make(group, store, rank, size, options)

    gloo.__init__ = with_shared_device


def _install_weight_gradient() -> None:
    """The module of apex's kernel; layers that are told to use it do so, see training/accumulation.py."""
    module = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = add_weight_gradient
    sys.modules[module.__name__] = module


def install() -> None:
    """Install every entry, then those that live inside megatron-core."""
    _install_runtime()
    _install_rng()
    _install_factories()
    _install_tensor_types()
    _install_collectives()
    _install_gloo_devices()
    _install_weight_gradient()

    # torch.compile of small fused functions needs a C++ compiler and takes seconds per function on a CPU.
    import megatron.core.jit as jit

    jit.disable_jit_fuser()

    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    rope_utils.fused_apply_rotary_pos_emb = rotate
