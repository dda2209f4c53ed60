"""What a module of this folder needs, as marks for its `pytestmark`."""

import importlib.util

import pytest
import torch

from megatron_mm1.parallel.device import transformer_engine_problem

NO_CUDA = "no CUDA device"
_problem = transformer_engine_problem()

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)]
"""A CUDA device."""

TRANSFORMER_ENGINE = [*GPU, pytest.mark.skipif(_problem is not None, reason=f"Transformer Engine: {_problem}")]
"""Transformer Engine on it."""

DALI = [
    *GPU,
    pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="nvidia-dali-cuda130 is not installed"),
]
"""DALI on it."""

BACKENDS = [
    "local",
    pytest.param("transformer_engine", marks=TRANSFORMER_ENGINE[-1]),
]
"""Both layer backends, for `parametrize`."""
