"""Linear."""

from types import SimpleNamespace
from typing import Any

from transformer_engine._release import released
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.module.products import ParallelProduct

_PATH = "pytorch/module/linear.py"
PRODUCT = (
    "in_features",
    "out_features",
    "sequence_parallel",
    "fuse_wgrad_accumulation",
    "tp_group",
    "tp_size",
    "get_rng_state_tracker",
    "init_method",
    "bias",
    "return_bias",
    "params_dtype",
    "parallel_mode",
    "device",
    "name",
)
"""Arguments of the constructor that `ParallelProduct` acts on."""


class Linear(ParallelProduct):
    """y = x W^T + b."""

    @released(_PATH, *PRODUCT, "rng_tracker_name", "save_original_input")
    def __init__(self, arguments: SimpleNamespace) -> None:
        self.start(arguments)
        self.make_product(arguments)
        self.save_original_input = arguments.save_original_input

    @released(_PATH, "inp", "is_first_microbatch")
    def forward(self, arguments: SimpleNamespace) -> Any:
        recipe = self.record(arguments.inp)
        self.check(arguments.inp, recipe)
        if self.save_original_input and isinstance(recipe, DelayedScaling):
            raise ValueError("DelayedScaling recipe is not supported with save_original_input")
        return self.multiply(arguments.inp)
