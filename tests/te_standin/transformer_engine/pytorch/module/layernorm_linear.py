"""LayerNormLinear."""

from types import SimpleNamespace
from typing import Any

import torch

from transformer_engine._release import released
from transformer_engine.pytorch.module.linear import PRODUCT
from transformer_engine.pytorch.module.norms import normalise
from transformer_engine.pytorch.module.products import ParallelProduct

_PATH = "pytorch/module/layernorm_linear.py"


class LayerNormLinear(ParallelProduct):
    """y = norm(x) W^T + b; under sequence parallelism the norm sees this rank's slice."""

    @released(_PATH, *PRODUCT, "eps", "normalization", "zero_centered_gamma")
    def __init__(self, arguments: SimpleNamespace) -> None:
        assert arguments.normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        self.start(arguments)
        self.eps, self.zero_centered_gamma = arguments.eps, arguments.zero_centered_gamma
        shape = (arguments.in_features,)
        initial = torch.nn.init.zeros_ if self.zero_centered_gamma else torch.nn.init.ones_
        self.add_parameter("layer_norm_weight", shape, arguments, initial)
        if arguments.normalization == "LayerNorm":
            self.add_parameter("layer_norm_bias", shape, arguments, torch.nn.init.zeros_)
        else:
            self.layer_norm_bias = None
        self.normalization = arguments.normalization
        self.make_product(arguments)
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    @released(_PATH, "inp", "is_first_microbatch")
    def forward(self, arguments: SimpleNamespace) -> Any:
        self.check(arguments.inp, self.record(arguments.inp))
        return self.multiply(
            normalise(
                arguments.inp,
                self.layer_norm_weight,
                self.layer_norm_bias,
                normalization=self.normalization,
                eps=self.eps,
                zero_centered_gamma=self.zero_centered_gamma,
            )
        )
