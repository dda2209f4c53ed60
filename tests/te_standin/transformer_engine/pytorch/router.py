"""The router's fused kernels, which megatron-core imports and megatron_mm1 does not use: its router is its own."""

from typing import Any, NoReturn


def _absent(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("the stand-in has no fused router kernels")


fused_topk_with_score_function = fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = _absent
