"""Rotary embedding: the release's own unfused one."""

from types import SimpleNamespace
from typing import Any, Union

import torch
from torch import Tensor

from transformer_engine._release import functions, released

_PATH = "pytorch/attention/rope.py"
_unfused = functions(
    _PATH,
    "apply_rotary_pos_emb",
    "_apply_rotary_pos_emb_base",
    "_get_freqs_on_this_cp_rank",
    "_rotate_half",
    torch=torch,
    Any=Any,
    Union=Union,
)[0]


@released(
    _PATH, "t", "freqs", "tensor_format", "start_positions", "interleaved", "fused", "cu_seqlens", "cp_size", "cp_rank"
)
def apply_rotary_pos_emb(arguments: SimpleNamespace) -> Tensor:
    return _unfused(**dict(vars(arguments), fused=False))
