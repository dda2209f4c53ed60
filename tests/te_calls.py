"""Calls of the stand-in that the release would refuse; each returns what was raised."""

from collections.abc import Callable

import torch


def _raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def wrong_calls() -> dict[str, str]:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    layer = te.Linear(32, 48, device="cpu")
    projection = te.Linear(32, 32, device="cpu", save_original_input=True)
    norm_layer = te.LayerNormLinear(32, 24, device="cpu")
    experts = te.GroupedLinear(2, 32, 32, device="cpu")
    attention = te.DotProductAttention(4, 8, num_gqa_groups=2)
    packed = torch.ones(6, 4, 8), torch.ones(6, 2, 8), torch.ones(6, 2, 8)

    def within(recipe: object, call: Callable[[], object]) -> Callable[[], object]:
        def enter() -> object:
            with te.autocast(recipe=recipe):
                return call()

        return enter

    current = Float8CurrentScaling()
    calls = {
        "unknown keyword": lambda: te.Linear(32, 48, hidden_size=3),
        "missing argument": lambda: te.LayerNormLinear(32),
        "unknown keyword of a norm's operation": lambda: te.RMSNorm(32, dtyp=torch.float32),
        "unknown keyword of forward": lambda: layer(torch.ones(16, 32), first=True),
        "option without effect": lambda: te.Linear(32, 48, ub_overlap_ag=True),
        "dtype of the input": lambda: layer(torch.ones(16, 32, dtype=torch.bfloat16)),
        "rows, in FP8": within(current, lambda: layer(torch.ones(12, 32))),
        "rows of the weight's gradient, in FP8": within(current, lambda: layer(torch.ones(8, 32))),
        "width, in FP8": within(current, lambda: norm_layer(torch.ones(16, 32))),
        "rows of an expert, in FP8": within(current, lambda: experts(torch.ones(32, 32), [20, 12])),
        "original input with delayed scaling": within(DelayedScaling(), lambda: projection(torch.ones(16, 32))),
        "packed without boundaries": lambda: attention(*packed, qkv_format="thd", attn_mask_type="padding"),
        "packed and no padding mask": lambda: attention(*packed, qkv_format="thd", attn_mask_type="causal"),
        "heads": lambda: attention(packed[0], packed[0], packed[0], qkv_format="thd", attn_mask_type="padding"),
    }
    return {name: _raised(call) for name, call in calls.items()}
