"""Which kernel runs: none here, but what the release's environment variables leave is counted."""

import logging
import os

_attention_backends = {"backend_selection_requires_update": True}


class AttentionLogging:
    _log_level = logging.WARNING


def choose_backend() -> None:
    """By the release's environment variables, as if cuDNN had a kernel for everything and flash-attn were absent.

    Like the release it says why at the level of debugging alone, and not again before the choice is reset.
    """
    fused, unfused = (os.environ.get(f"NVTE_{kind}_ATTN", "1") == "1" for kind in ("FUSED", "UNFUSED"))
    if _attention_backends["backend_selection_requires_update"]:
        _attention_backends["backend_selection_requires_update"] = False
        logger = logging.getLogger("DotProductAttention")
        logger.setLevel(AttentionLogging._log_level)
        if not fused:
            logger.debug("Disabling FusedAttention due to NVTE_FUSED_ATTN=0")
        if not unfused:
            logger.debug("Disabling UnfusedDotProductAttention due to NVTE_UNFUSED_ATTN=0")
    if not (fused or unfused):
        raise ValueError(
            "No dot product attention backend is available for the provided inputs. Please run with NVTE_DEBUG=1 "
            "NVTE_DEBUG_LEVEL=2 to find out the reasons for disabling all backends."
        )
