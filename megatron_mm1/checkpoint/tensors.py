"""Named tensors that are read, changed and written a piece at a time: what a conversion is made of.

A conversion is a `Plan`: every tensor of the result with its name, shape and dtype, known before anything is read, and
for each the pieces it consists of, read when they are written. What does not fit in memory as a whole never has to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Where tensors are read from: a folder of safetensors files, an MM1 checkpoint, tensors in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor on the CPU, or some of its rows (first dimension); the caller may keep but not change it."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows (first dimension) of a planned tensor, read when they are wanted."""

    num_rows: int
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the result.

    Attributes:
        name: in the result.
        sources: what it is made of, for people to read.
        pieces: its rows in order. A tensor without dimensions has one piece.
    """

    name: str
    info: TensorInfo
    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]


Plan = list[PlannedTensor]


@dataclass(frozen=True)
class StateDict:
    """A `TensorSource` over tensors in memory."""

    state: Mapping[str, Tensor]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.state.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self.state[name].detach().cpu()
        return tensor if rows is None else tensor[rows]


def copied(source: TensorSource, name: str, *, to: str | None = None) -> PlannedTensor:
    """A tensor as it is, under the same name or another."""
    info = source.tensors[name]
    rows = info.shape[0] if info.shape else 1
    return PlannedTensor(to or name, info, (name,), (Piece(rows, lambda: source.read(name)),))


def collect(plan: Plan) -> dict[str, Tensor]:
    """Carry a plan out in memory."""
    return {
        planned.name: pieces[0] if len(pieces := [piece.read() for piece in planned.pieces]) == 1 else torch.cat(pieces)
        for planned in plan
    }
