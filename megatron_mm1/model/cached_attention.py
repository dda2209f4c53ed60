"""Attention of a decoder that generates: keys and values of earlier positions are kept, sequences have any lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
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


class Attention(Protocol):
    """What the positions of a pass, flattened to [T], attend to."""

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One layer's attention.

        Args:
            query: [T, 1, heads, head_dim], rotated.
            key, value: [T, 1, groups, head_dim], keys rotated.

        Returns:
            [T, 1, heads * head_dim].
        """
        ...


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


@dataclass(frozen=True)
class StretchAttention:
    """Causal attention within stretches and to those that they continue; positions in none of them attend to nothing.

    Attributes:
        stretches: in order, without gaps from position 0.
        cache: what rows of stretches are of.
    """

    stretches: Sequence[Stretch]
    cache: KeyValueCache | None = None

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context = torch.zeros_like(query)
        queries, keys, values = (
            x.transpose(0, 2).transpose(0, 1) for x in (query, key, value)
        )  # [1, heads, T, head_dim]
        for stretch in self.stretches:
            own = slice(stretch.start, stretch.stop)
            seen_keys, seen_values = self._seen(keys, stretch), self._seen(values, stretch)
            attended = scaled_dot_product_attention(
                queries[:, :, own],
                seen_keys,
                seen_values,
                attn_mask=None if stretch.behind is None else _causal_mask(stretch, seen_keys),
                is_causal=stretch.behind is None,
                enable_gqa=keys.shape[1] != queries.shape[1],
            )
            context[own] = attended.permute(2, 0, 1, 3)
            if stretch.row is not None and self.cache is not None:
                for stored, new in zip(self.cache.layer(layer_number, key), (keys, values), strict=True):
                    stored[stretch.row, :, : stretch.stop - stretch.start] = new[0, :, own]
        return context.flatten(2)

    def _seen(self, x: Tensor, stretch: Stretch) -> Tensor:
        """The keys or values [1, groups, n, head_dim] that a stretch attends to, its own last."""
        own = x[:, :, stretch.start : stretch.stop]
        if stretch.behind is None:
            return own
        before = self.stretches[stretch.behind]
        return torch.cat((x[:, :, before.start : before.stop], own), dim=2)


def _causal_mask(stretch: Stretch, keys: Tensor) -> Tensor:
    """[n, keys] True where a position of the stretch, the last of which is the last key, sees the key."""
    queries, num_keys = stretch.stop - stretch.start, keys.shape[2]
    return torch.ones(queries, num_keys, dtype=torch.bool, device=keys.device).tril(num_keys - queries)


@dataclass
class DecodeAttention:
    """Position t of a pass continues the sequence in row t of the cache, which its key and value are added to.
    Positions beyond the rows are padding and attend to nothing.

    Attributes:
        lengths: positions that each of the first rows has in the cache already.
    """

    cache: KeyValueCache
    lengths: Sequence[int]
    _tensors: tuple[Tensor, Tensor, Tensor] | None = field(init=False, default=None)

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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
        ).reshape(rows, 1, heads * head_dim)
        if rows == len(query):
            return attended
        return torch.cat((attended, attended.new_zeros(len(query) - rows, *attended.shape[1:])))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [n], the place of each one's new position [n], and what it sees [n, 1, 1, keys]: once for all layers."""
        if self._tensors is None:
            place = torch.tensor(self.lengths).to(device, non_blocking=True)
            keys = torch.arange(max(self.lengths) + 1, device=device)
            mask = (keys <= place[:, None])[:, None, None]
            self._tensors = (torch.arange(len(self.lengths), device=device), place, mask)
        return self._tensors
