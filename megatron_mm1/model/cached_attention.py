"""Attention of a decoder that generates: keys and values of earlier positions are kept, and examples have any lengths.

megatron-core hands `PackedSeqParams` down to its attention modules. Those here say what each position attends to, and
both backends' modules then leave attending to them; it is torch's scaled_dot_product_attention with either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KeyValueCache:
    """Rotated keys, and values, of sequences in progress.

    Args:
        rows: how many sequences.
        capacity: positions of each.
    """

    def __init__(self, *, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, groups, capacity, head_dim] of a layer, made when it is first asked for.

        Args:
            like: [.., groups, head_dim] of this layer's keys.
        """
        if number not in self._layers:
            shape = (self.rows, like.shape[-2], self.capacity, like.shape[-1])
            # Zeros: positions that nothing was written to get no weight, but no weight times NaN is NaN.
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def move(self, source: int, target: int, *, length: int) -> None:
        """Overwrite row `target` with the first `length` positions of row `source`."""
        for layer in self._layers.values():
            for stored in layer:
                stored[target, :, :length] = stored[source, :, :length]


@dataclass
class CachedAttentionParams(PackedSeqParams):
    """What the positions of a pass, flattened to [T], attend to."""

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """One layer's attention.

        Args:
            query: [T, 1, heads, head_dim], rotated.
            key, value: [T, 1, groups, head_dim], keys rotated.
            scale: of the products; None: 1 / sqrt(head_dim).

        Returns:
            [T, 1, heads * head_dim].
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Stretch:
    """Successive positions of a sequence, start <= t < stop of a pass.

    Attributes:
        behind: number of an earlier stretch that it continues, as others may; None: it begins a sequence.
        row: of the cache, where its keys and values are kept; None: nowhere.
    """

    start: int
    stop: int
    behind: int | None = None
    row: int | None = None


@dataclass
class StretchAttention(CachedAttentionParams):
    """Causal attention within stretches and to those that they continue; positions in none of them attend to nothing.

    Attributes:
        stretches: in order, without gaps from position 0.
        cache: what rows of stretches are of.
    """

    stretches: Sequence[Stretch] = ()
    cache: KeyValueCache | None = None

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        context = torch.zeros_like(query)
        by_head = [x.squeeze(1).transpose(0, 1) for x in (query, key, value)]  # [heads or groups, T, head_dim]
        for stretch in self.stretches:
            own = slice(stretch.start, stretch.stop)
            queries, keys, values = (x[None, :, own] for x in by_head)
            mask = None
            if stretch.behind is not None:
                before = self.stretches[stretch.behind]
                past = slice(before.start, before.stop)
                keys, values = (torch.cat((x[None, :, past], x[None, :, own]), dim=2) for x in by_head[1:])
                mask = _causal_mask(queries.shape[2], keys.shape[2], device=query.device)
            attended = scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=keys.shape[1] != queries.shape[1],
            )
            context[own, 0] = attended[0].transpose(0, 1)
            if stretch.row is not None and self.cache is not None:
                for stored, new in zip(self.cache.layer(layer_number, key), (keys, values), strict=True):
                    stored[stretch.row, :, : stretch.stop - stretch.start] = new[0]
        return context.flatten(2)


def _causal_mask(queries: int, keys: int, *, device: torch.device) -> Tensor:
    """[queries, keys] True where the query, the last of which is the last key, sees the key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@dataclass
class DecodeAttention(CachedAttentionParams):
    """Position t of a pass continues the sequence in row t of the cache, which its key and value are added to.
    Positions beyond the rows are padding and attend to nothing.

    Attributes:
        lengths: positions that each of the first rows has in the cache already.
    """

    cache: KeyValueCache = field(kw_only=True)
    lengths: Sequence[int] = field(kw_only=True)

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        rows, (heads, head_dim), groups = len(self.lengths), query.shape[-2:], key.shape[-2]
        number, place, mask = self._on(query.device)
        keys, values = self.cache.layer(layer_number, key)
        keys[number, :, place] = key[:rows, 0]
        values[number, :, place] = value[:rows, 0]
        longest = mask.shape[-1]
        attended = scaled_dot_product_attention(
            query[:rows].view(rows, groups, heads // groups, head_dim),  # heads of a group see the same keys
            keys[:rows, :, :longest],
            values[:rows, :, :longest],
            attn_mask=mask,
            scale=scale,
        )
        context = query.new_zeros(len(query), 1, heads * head_dim)
        context[:rows, 0] = attended.reshape(rows, heads * head_dim)
        return context

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [n], the place of each one's new position [n], and what it sees [n, 1, 1, keys]: once for all layers."""
        if self._tensors is None:
            place = torch.tensor(self.lengths).to(device, non_blocking=True)
            keys = torch.arange(max(self.lengths) + 1, device=device)
            mask = (keys <= place[:, None])[:, None, None]
            self._tensors = (torch.arange(len(self.lengths), device=device), place, mask)
        return self._tensors

    _tensors: tuple[Tensor, Tensor, Tensor] | None = field(init=False, default=None)
