"""Tokens sorted by expert and back, by the mask of which expert takes which token."""

from types import SimpleNamespace

import torch
from torch import Tensor

from transformer_engine._release import released

_PATH = "pytorch/permutation.py"


def _rows(routing_map: Tensor) -> Tensor:
    """[tokens, experts] the row, among those sorted by expert, of each token that an expert takes; -1: it does not."""
    assigned = routing_map.bool()
    order = assigned.t().flatten().cumsum(0).view(assigned.shape[::-1]).t() - 1
    return torch.where(assigned, order, -1)


def _gather(
    inp: Tensor, probs: Tensor | None, rows: Tensor, count: int, pad_offsets: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    token, expert = (rows >= 0).nonzero(as_tuple=True)
    if len(token) > count:
        raise RuntimeError(f"{len(token)} rows do not fit into num_out_tokens = {count}")
    target = rows[token, expert] + (0 if pad_offsets is None else pad_offsets[expert])
    output = inp.new_zeros(count, inp.shape[-1]).index_copy(0, target, inp[token])
    if probs is None:
        return output, None
    return output, probs.new_zeros(count).index_copy(0, target, probs[token, expert])


@released(_PATH, "inp", "routing_map", "num_out_tokens")
def moe_permute(arguments: SimpleNamespace) -> tuple[Tensor, Tensor]:
    rows = _rows(arguments.routing_map)
    return _gather(arguments.inp, None, rows, arguments.num_out_tokens, None)[0], rows


@released(_PATH, "inp", "probs", "routing_map", "num_out_tokens")
def moe_permute_with_probs(arguments: SimpleNamespace) -> tuple[Tensor, Tensor | None, Tensor]:
    rows = _rows(arguments.routing_map)
    return *_gather(arguments.inp, arguments.probs, rows, arguments.num_out_tokens, None), rows


@released(_PATH, "inp", "probs", "routing_map", "tokens_per_expert", "align_size")
def moe_permute_and_pad_with_probs(
    arguments: SimpleNamespace,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    counts, align = arguments.tokens_per_expert, arguments.align_size
    padded = (counts + align - 1) // align * align
    offsets = None
    if not torch.equal(counts, padded):
        padding = padded - counts
        offsets = padding.cumsum(0) - padding
    rows = _rows(arguments.routing_map)
    return *_gather(arguments.inp, arguments.probs, rows, int(padded.sum()), offsets), rows, offsets, padded


@released(_PATH, "inp", "row_id_map", "merging_probs", "restore_shape", "pad_offsets")
def moe_unpermute(arguments: SimpleNamespace) -> Tensor:
    inp, rows = arguments.inp, arguments.row_id_map
    token, expert = (rows >= 0).nonzero(as_tuple=True)
    source = rows[token, expert] + (0 if arguments.pad_offsets is None else arguments.pad_offsets[expert])
    taken = inp[source].float()
    if arguments.merging_probs is not None:
        taken = taken * arguments.merging_probs[token, expert].unsqueeze(1)
    total = taken.new_zeros(arguments.restore_shape or inp.shape).index_add(0, token, taken)
    return total.to(inp.dtype)


def _sorted_chunks(tensor: Tensor, arguments: SimpleNamespace) -> Tensor:
    chunks = tensor.split(arguments.split_sizes.tolist())
    return torch.cat([chunks[index] for index in arguments.sorted_index.tolist()])


@released(_PATH, "inp", "split_sizes", "sorted_index")
def moe_sort_chunks_by_index(arguments: SimpleNamespace) -> Tensor:
    return _sorted_chunks(arguments.inp, arguments)


@released(_PATH, "inp", "probs", "split_sizes", "sorted_index")
def moe_sort_chunks_by_index_with_probs(arguments: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return _sorted_chunks(arguments.inp, arguments), _sorted_chunks(arguments.probs, arguments)
