"""Transformer Engine's packed attention where it has a kernel for it, also under context parallelism.

Transformer Engine can split packed sequences over ranks itself, but only where the length of every example is a
multiple of 2 C, which would change what is packed with the layout. Instead each rank gathers keys and values and runs
the packed kernel on each of its two chunks of queries. Imported only where Transformer Engine is.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends
from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionLogging

from megatron_mm1.errors import UserError
from megatron_mm1.model.packed_attention import ContextParallelParams, attend_from_chunks
from megatron_mm1.parallel.context import ChunkBoundaries


class KernelAttention(te.TEDotProductAttention):
    """TEDotProductAttention that refuses to multiply whole matrices of scores, which Transformer Engine does without a
    word where it finds no kernel; arguments as there."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TEDotProductAttention's.

        Raises:
            UserError: Transformer Engine has no kernel for these inputs; with its reasons.
        """
        return with_a_kernel(lambda: super(KernelAttention, self).forward(*args, **kwargs))


class ContextParallelAttention(te.TEDotProductAttention):
    """KernelAttention on a rank's own queries and everyone's keys."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # the kernel shall not split anything itself
        super().__init__(whole, *args, pg_collection=pg_collection, **kwargs)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: ContextParallelParams,
        **kwargs: Any,
    ) -> Tensor:
        """Shapes as `attend_from_chunks`; `attention_mask` is unused: `packed_seq_params` says it all.

        Raises:
            UserError: as KernelAttention.
        """
        return attend_from_chunks(
            self._attend_from_chunk, query, key, value, chunks=packed_seq_params.chunks, group=self.context_group
        )

    def _attend_from_chunk(self, query: Tensor, key: Tensor, value: Tensor, chunk: ChunkBoundaries) -> Tensor:
        # megatron-core's forward would take the boundaries from a PackedSeqParams, and the mask from the layer.
        return with_a_kernel(
            lambda: super(te.TEDotProductAttention, self).forward(
                query.contiguous(),
                key.contiguous(),
                value.contiguous(),
                None,
                qkv_format="thd",
                attn_mask_type="padding_causal_bottom_right",
                cu_seqlens_q=chunk.cu_seqlens_q,
                cu_seqlens_kv=chunk.cu_seqlens_kv,
                max_seqlen_q=chunk.max_seqlen_q,
                max_seqlen_kv=chunk.max_seqlen_kv,
            )
        )


def with_a_kernel(attend: Callable[[], Tensor]) -> Tensor:
    """What a call of Transformer Engine's attention returns, if there is a kernel for it.

    Raises:
        UserError: there is none; with Transformer Engine's reasons.
    """
    try:
        with _no_whole_products():
            return attend()
    except ValueError as error:
        if "No dot product attention backend" not in str(error):
            raise
        raise UserError(
            f"training.attention_kernel transformer_engine: Transformer Engine has no attention kernel for this input: "
            f"{'; '.join(_reasons(attend)) or 'it gives no reason'}. Use training.attention_kernel torch, or see "
            "docs/install.md on cuDNN"
        ) from error


@contextmanager
def _no_whole_products() -> Iterator[None]:
    """Take Transformer Engine's last resort from it. megatron-core sets the variable to 1 as it builds a model."""
    name = "NVTE_UNFUSED_ATTN"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Disabled(logging.Handler):
    """Keeps what Transformer Engine logs of the kernels that it does not use."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Disabling ") and "NVTE_UNFUSED_ATTN" not in message:
            self.reasons.append(message)


def _reasons(attend: Callable[[], Tensor]) -> list[str]:
    """Why no kernel will do for a call: it is made again, and Transformer Engine chooses again, aloud."""
    _attention_backends["backend_selection_requires_update"] = True
    logger, handler = logging.getLogger("DotProductAttention"), _Disabled()
    level, propagate = AttentionLogging._log_level, logger.propagate
    AttentionLogging._log_level = logging.DEBUG  # which the logger is set to at each choice
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with _no_whole_products(), suppress(ValueError):
            attend()
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        AttentionLogging._log_level = level
    return handler.reasons
