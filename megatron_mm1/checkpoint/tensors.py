"""Named tensors that are read, changed and written a piece at a time: what a conversion is made of.

A conversion is a `Plan`: every tensor of the result with its name, shape and dtype, known before anything is read, and
for each the pieces it consists of, read when they are written. What does not fit in memory as a whole never has to.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
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


def read_pieces(planned: PlannedTensor) -> Iterator[tuple[int, Tensor]]:
    """Each piece's first row, and the piece. Whoever lets go of a piece before asking for the next has one at a time.

    Raises:
        RuntimeError: a piece is not what was planned.
    """
    row, info = 0, planned.info
    for piece in planned.pieces:
        yield row, _checked(piece.read(), planned, num_rows=piece.num_rows)
        row += piece.num_rows
    if row != (info.shape[0] if info.shape else 1):
        raise RuntimeError(f"{planned.name} has shape {info.shape}, but its pieces have {row} rows")


def _checked(tensor: Tensor, planned: PlannedTensor, *, num_rows: int) -> Tensor:
    shape = (num_rows, *planned.info.shape[1:]) if planned.info.shape else ()
    if tuple(tensor.shape) != shape or tensor.dtype != planned.info.dtype:
        raise RuntimeError(
            f"a piece of {planned.name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, "
            f"planned were {shape} and {planned.info.dtype}"
        )
    return tensor


def collect(plan: Plan) -> dict[str, Tensor]:
    """Carry a plan out in memory."""
    return {
        planned.name: pieces[0] if len(pieces := [piece.read() for piece in planned.pieces]) == 1 else torch.cat(pieces)
        for planned in plan
    }


class PlanSource:
    """The result of a plan as a `TensorSource`, so that another conversion, or a comparison, can start from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._planned = {planned.name: planned for planned in plan}
        self._last: tuple[Piece, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: planned.info for name, planned in self._planned.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        planned = self._planned[name]
        if not planned.info.shape:
            return planned.pieces[0].read()
        first, last, _ = (rows or slice(None)).indices(planned.info.shape[0])
        parts, row = [], 0
        for piece in planned.pieces:
            begin, end = max(first - row, 0), min(last - row, piece.num_rows)
            if begin < end:
                parts.append(self._read_piece(piece)[begin:end])
            row += piece.num_rows
        if not parts:
            return torch.empty(0, *planned.info.shape[1:], dtype=planned.info.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_piece(self, piece: Piece) -> Tensor:
        """A large piece is often asked for some rows at a time, so the last one is kept."""
        if self._last is None or self._last[0] is not piece:
            self._last = None
            self._last = piece, piece.read()
        return self._last[1]


@dataclass(frozen=True)
class Subset:
    """The tensors of a source whose names begin in one of these ways."""

    source: TensorSource
    prefixes: tuple[str, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: info for name, info in self.source.tensors.items() if name.startswith(self.prefixes)}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.source.read(name, rows)


def in_pieces(source: TensorSource, name: str, *, num_pieces: int) -> PlannedTensor:
    """A tensor as it is, in so many pieces, equal to within a row; fewer where it has fewer rows."""
    info = source.tensors[name]
    if not info.shape or num_pieces == 1:
        return copied(source, name)
    rows = info.shape[0]
    bounds = [rows * number // num_pieces for number in range(num_pieces + 1)]
    pieces = tuple(
        Piece(end - begin, lambda begin=begin, end=end: source.read(name, slice(begin, end)))  # type: ignore[misc]
        for begin, end in pairwise(bounds)
        if begin < end
    )
    return PlannedTensor(name, info, (name,), pieces or copied(source, name).pieces)
