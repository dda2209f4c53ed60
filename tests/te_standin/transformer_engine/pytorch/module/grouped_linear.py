"""GroupedLinear."""

from types import SimpleNamespace
from typing import Any

import torch

from transformer_engine._release import released
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, check_product, mark_parallel
from transformer_engine.pytorch.module.linear import PRODUCT
from transformer_engine.pytorch.module.products import product

_PATH = "pytorch/module/grouped_linear.py"


class GroupedLinear(TransformerEngineBaseModule):
    """Products of consecutive groups of rows, each with a weight of its own; it does not communicate."""

    @released(_PATH, *PRODUCT, "num_gemms", "rng_tracker_name", "ub_name", "save_original_input")
    def __init__(self, arguments: SimpleNamespace) -> None:
        self.start(arguments)
        self.use_group(arguments)
        self.num_gemms = arguments.num_gemms
        self.in_features, self.out_features = arguments.in_features, arguments.out_features
        if self.tp_size > 1 and arguments.bias:
            raise ValueError("GroupedLinear doesn't support bias when TP > 1.")
        self.parallel_mode = arguments.parallel_mode
        if self.parallel_mode == "column":
            self.out_features //= self.tp_size
        elif self.parallel_mode == "row":
            self.in_features //= self.tp_size
        self.sequence_parallel = self.tp_size > 1 and arguments.sequence_parallel
        self.fuse_wgrad_accumulation = arguments.fuse_wgrad_accumulation
        self.use_bias, self.return_bias = arguments.bias, arguments.return_bias
        self.save_original_input = arguments.save_original_input
        for gemm in range(self.num_gemms):
            shape = (self.out_features, self.in_features)
            weight = self.add_parameter(f"weight{gemm}", shape, arguments, arguments.init_method, tracked=True)
            mark_parallel(weight, 1 if self.parallel_mode == "row" else 0)
            if self.use_bias:
                self.add_parameter(f"bias{gemm}", (self.out_features,), arguments, torch.nn.init.zeros_)

    @released(_PATH, "inp", "m_splits", "is_first_microbatch")
    def forward(self, arguments: SimpleNamespace) -> Any:
        inp, splits = arguments.inp, [int(rows) for rows in arguments.m_splits]
        recipe = self.record(inp)
        if len(splits) != self.num_gemms or sum(splits) != inp.numel() // inp.shape[-1]:
            raise ValueError(f"m_splits {splits} are not {self.num_gemms} parts of an input {list(inp.shape)}")
        if self.save_original_input and isinstance(recipe, DelayedScaling):
            raise ValueError("DelayedScaling recipe is not supported with save_original_input")
        weights = [self.get_parameter(f"weight{gemm}") for gemm in range(self.num_gemms)]
        biases = [self.get_parameter(f"bias{gemm}") for gemm in range(self.num_gemms)] if self.use_bias else []
        self.note_largest(inp, weights)
        outputs = []
        for part, weight in zip(inp.view(-1, self.in_features).split(splits), weights, strict=True):
            check_product(recipe, len(part), weight)
            outputs.append(product(part, weight, fuse_wgrad_accumulation=self.fuse_wgrad_accumulation))
        if self.use_bias and not self.return_bias:
            outputs = [output + bias for output, bias in zip(outputs, biases, strict=True)]
        output = torch.cat(outputs).view(*inp.shape[:-1], self.out_features)
        return (output, biases) if self.return_bias else output
