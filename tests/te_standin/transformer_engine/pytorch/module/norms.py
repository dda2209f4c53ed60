"""RMSNorm and LayerNorm."""

from types import SimpleNamespace

import torch
from torch import Tensor

from transformer_engine._release import bind, released
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

_NORM = ("normalized_shape", "eps", "sequence_parallel", "params_dtype", "zero_centered_gamma", "kwargs")


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, normalization: str, eps: float, zero_centered_gamma: bool
) -> Tensor:
    """Over the last dimension, in float32 as the kernels compute."""
    scale = weight.float() + 1 if zero_centered_gamma else weight.float()
    if normalization == "RMSNorm":
        normalised = torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), scale, eps)
    else:
        assert bias is not None
        normalised = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), scale, bias.float(), eps)
    return normalised.to(x.dtype)


class _Norm(TransformerEngineBaseModule):
    """RMSNorm, and LayerNorm where it has a bias."""

    bias: torch.nn.Parameter | None

    def make(self, arguments: SimpleNamespace, operation: str, *, bias: bool) -> None:
        """Construct; `operation`: the file of the class that gets the remaining keyword arguments."""
        self.start(arguments)
        extra = bind(
            operation,
            f"{type(self).__name__}.__init__",
            (self, arguments.normalized_shape),
            dict(arguments.kwargs, zero_centered_gamma=arguments.zero_centered_gamma),
            {"normalized_shape", "device", "zero_centered_gamma"},
        )
        self.eps, self.zero_centered_gamma = arguments.eps, arguments.zero_centered_gamma
        arguments.device = extra.device
        shape = (arguments.normalized_shape,)
        initial = torch.nn.init.zeros_ if self.zero_centered_gamma else torch.nn.init.ones_
        self.add_parameter("weight", shape, arguments, initial)
        if bias:
            self.add_parameter("bias", shape, arguments, torch.nn.init.zeros_)
        else:
            self.register_parameter("bias", None)
        if arguments.sequence_parallel is not None:
            for parameter in self.parameters():
                parameter.sequence_parallel = arguments.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Tensor) -> Tensor:
        """[..., size] -> the same shape and dtype."""
        self.record(inp)
        return normalise(
            inp,
            self.weight,
            self.bias,
            normalization="RMSNorm" if self.bias is None else "LayerNorm",
            eps=self.eps,
            zero_centered_gamma=self.zero_centered_gamma,
        )


class RMSNorm(_Norm):
    @released("pytorch/module/rmsnorm.py", *_NORM)
    def __init__(self, arguments: SimpleNamespace) -> None:
        self.make(arguments, "pytorch/ops/basic/rmsnorm.py", bias=False)


class LayerNorm(_Norm):
    @released("pytorch/module/layernorm.py", *_NORM)
    def __init__(self, arguments: SimpleNamespace) -> None:
        self.make(arguments, "pytorch/ops/basic/layer_norm.py", bias=True)
