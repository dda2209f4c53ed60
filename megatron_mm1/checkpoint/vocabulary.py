"""More rows for a decoder's vocabulary, for the symbols that a tokenizer was extended by."""

from dataclasses import replace

import torch

from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor
from megatron_mm1.config.derived import padded_vocab_size
from megatron_mm1.config.schema import ModelConfig

TABLES = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


def with_vocabulary(model: ModelConfig, plan: Plan, *, vocab_size: int) -> tuple[ModelConfig, Plan]:
    """`model`, and the plan of its tensors, with a row for each of at least `vocab_size` ids.

    A vocabulary that is too small grows to the next size that needs no padding, so that the model is the same wherever
    it is exported to. New rows are zeros, as padding's are.
    """
    if vocab_size <= model.decoder.vocab_size:
        return model, plan
    rows = padded_vocab_size(vocab_size)
    grown = replace(model, decoder=replace(model.decoder, vocab_size=rows))
    return grown, [_with_rows(planned, rows) if planned.name in TABLES else planned for planned in plan]


def _with_rows(planned: PlannedTensor, rows: int) -> PlannedTensor:
    there, width = planned.info.shape
    if rows == there:
        return planned
    info = replace(planned.info, shape=(rows, width))
    zeros = Piece(rows - there, lambda: torch.zeros(rows - there, width, dtype=info.dtype))
    return replace(planned, info=info, pieces=(*planned.pieces, zeros))
