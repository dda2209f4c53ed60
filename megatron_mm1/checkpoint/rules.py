"""How tensors of two models correspond, and the plans that follow from it in both directions.

A `Rule` says which rows of which tensors of theirs one tensor of ours is made of. Importing reads it forwards,
exporting backwards: there is no second description that could disagree with the first.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorInfo, TensorSource
from megatron_mm1.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of the `part`-th of their tensors; None: rows they do not have, zeros in ours."""

    part: int | None
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One tensor of ours, and theirs that hold the same numbers.

    Attributes:
        ours: its name, which may hold placeholders that `for_layers` fills in.
        theirs: their names; with `{expert}` in them, ours stacks the experts along a first dimension.
        shape: of ours, without that dimension.
        rows: of theirs, in the order in which they make up ours (or each expert).
        num_experts: how many are stacked; None where there are none.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: Shape
    rows: tuple[Rows, ...]
    num_experts: int | None = None

    @property
    def our_shape(self) -> Shape:
        return self.shape if self.num_experts is None else (self.num_experts, *self.shape)

    def their_shape(self, part: int) -> Shape:
        return (sum(rows.count for rows in self.rows if rows.part == part), *self.shape[1:])

    def their_names(self, part: int) -> list[str]:
        """Of each expert; one where there are none."""
        return [self.theirs[part].format(expert=expert) for expert in range(self.num_experts or 1)]


@dataclass(frozen=True)
class Filler:
    """A tensor of theirs that says nothing about a model of ours: written on export, not read on import."""

    theirs: str
    shape: Shape
    make: Callable[[Shape], Tensor] = torch.zeros


@dataclass(frozen=True)
class Correspondence:
    """All of a model.

    Attributes:
        rules: of every tensor of ours.
        fillers: what else theirs has to have.
        unread: how names of theirs begin that are no part of ours, and are not looked at.
        components: how the names of ours begin.
    """

    rules: tuple[Rule, ...]
    fillers: tuple[Filler, ...] = ()
    unread: tuple[str, ...] = ()
    components: tuple[str, ...] = ()

    def __add__(self, other: "Correspondence") -> "Correspondence":
        return Correspondence(
            self.rules + other.rules,
            self.fillers + other.fillers,
            self.unread + other.unread,
            self.components + other.components,
        )

    def renamed(self, rename: Callable[[str], str]) -> "Correspondence":
        """With other names of theirs."""
        return replace(
            self,
            rules=tuple(replace(rule, theirs=tuple(rename(name) for name in rule.theirs)) for rule in self.rules),
            fillers=tuple(replace(filler, theirs=rename(filler.theirs)) for filler in self.fillers),
            unread=tuple(rename(name) for name in self.unread),
        )


def same(ours: str, theirs: str, shape: Shape) -> Rule:
    """The same tensor under another name."""
    return Rule(ours=ours, theirs=(theirs,), shape=shape, rows=(Rows(0, 0, shape[0]),))


def padded(ours: str, theirs: str, shape: Shape, *, rows: int) -> Rule:
    """Theirs has `rows` rows; the rest of ours is zeros."""
    padding = (Rows(None, 0, shape[0] - rows),) if shape[0] > rows else ()
    return Rule(ours=ours, theirs=(theirs,), shape=shape, rows=(Rows(0, 0, rows), *padding))


def concatenated(ours: str, theirs: Sequence[str], shape: Shape, *, num_experts: int | None = None) -> Rule:
    """Equal parts one after the other, for each expert where there are some."""
    count = shape[0] // len(theirs)
    rows = tuple(Rows(part, 0, count) for part in range(len(theirs)))
    return Rule(ours=ours, theirs=tuple(theirs), shape=shape, rows=rows, num_experts=num_experts)


def grouped(ours: str, theirs: Sequence[str], shape: Shape, *, groups: int, counts: Sequence[int]) -> Rule:
    """megatron-core's fused qkv: for each query group the rows of its queries, then of its key, then of its value.

    Args:
        theirs: three tensors, or one in which all queries, all keys and all values follow each other.
        counts: rows of a group's queries, key and value.
    """
    fused = len(theirs) == 1
    starts = [groups * sum(counts[:part]) if fused else 0 for part in range(len(counts))]
    rows = tuple(
        Rows(0 if fused else part, starts[part] + group * count, count)
        for group in range(groups)
        for part, count in enumerate(counts)
    )
    return Rule(ours=ours, theirs=tuple(theirs), shape=shape, rows=rows)


def for_layers(rules: Iterable[Rule], placeholders: Iterable[Mapping[str, int]]) -> Iterator[Rule]:
    """The rules of every layer: their names hold the keys of `placeholders` in braces."""
    templates = list(rules)
    for numbers in placeholders:
        values = {"expert": "{expert}", **numbers}
        for rule in templates:
            theirs = tuple(name.format_map(values) for name in rule.theirs)
            yield replace(rule, ours=rule.ours.format_map(values), theirs=theirs)


def import_plan(
    correspondence: Correspondence,
    source: TensorSource,
    *,
    what: str,
    within: str = "",
    rename: Callable[[str], str] = lambda name: name,
) -> Plan:
    """Our tensors, made of theirs.

    Args:
        what: what the weights should be, for the message.
        within: how the names of the model begin in `source`; others are not looked at.
        rename: from a name in `source` to the one the rules use.

    Raises:
        UserError: every tensor that is missing, mis-shaped, no plain floating point, or has no place in ours.
    """
    tensors = source.tensors
    actual: dict[str, str] = {}
    faults = []
    for name in (name for name in tensors if name.startswith(within)):
        other = actual.setdefault(rename(name), name)
        if other != name:
            faults.append(f"twice: {other} and {name} are the same tensor")
    expected = {
        name: rule.their_shape(part)
        for rule in correspondence.rules
        for part in range(len(rule.theirs))
        for name in rule.their_names(part)
    }
    known = expected.keys() | {filler.theirs for filler in correspondence.fillers}
    extra = [real for name, real in actual.items() if name not in known and not name.startswith(correspondence.unread)]
    faults += _faults(tensors, {actual.get(name, name): shape for name, shape in expected.items()}, extra=extra)
    for rule in correspondence.rules:
        names = [actual[name] for part in range(len(rule.theirs)) for name in rule.their_names(part) if name in actual]
        if len(dtypes := {tensors[name].dtype for name in names}) > 1:
            faults.append(f"mixed: {', '.join(names)} make one tensor and are {_names(dtypes)}")
    if faults:
        raise _misfit(what, faults)
    return [_ours(rule, source, tensors, actual) for rule in correspondence.rules]


def export_plan(correspondence: Correspondence, source: TensorSource, *, what: str) -> Plan:
    """Their tensors, made of ours. Tensors of components that `correspondence` is not about are not looked at.

    Raises:
        UserError: every tensor that is missing, mis-shaped, no plain floating point, or has no place in theirs.
    """
    tensors, components = source.tensors, correspondence.components
    expected = {rule.ours: rule.our_shape for rule in correspondence.rules}
    extra = [name for name in tensors if name.startswith(components) and name not in expected]
    if faults := _faults(tensors, expected, extra=extra):
        raise _misfit(what, faults)
    plan = [theirs for rule in correspondence.rules for theirs in _theirs(rule, source, tensors[rule.ours].dtype)]
    dtype = tensors[correspondence.rules[0].ours].dtype
    for filler in correspondence.fillers:
        info = TensorInfo(filler.shape, dtype)
        plan.append(PlannedTensor(filler.theirs, info, (), (Piece(filler.shape[0], partial(_filled, filler, dtype)),)))
    return plan


def _ours(
    rule: Rule, source: TensorSource, tensors: Mapping[str, TensorInfo], actual: Mapping[str, str]
) -> PlannedTensor:
    names = [[actual[name] for name in rule.their_names(part)] for part in range(len(rule.theirs))]
    pieces = []
    for expert in range(rule.num_experts or 1):
        spans = [(None if rows.part is None else names[rows.part][expert], rows) for rows in rule.rows]
        whole = {part_names[expert]: rule.their_shape(part)[0] for part, part_names in enumerate(names)}
        read = partial(_read, source, spans, rule.shape, whole=whole, stacked=rule.num_experts is not None)
        pieces.append(Piece(1 if rule.num_experts else rule.shape[0], read))
    sources = tuple(name for part in names for name in part)
    return PlannedTensor(rule.ours, TensorInfo(rule.our_shape, tensors[sources[0]].dtype), sources, tuple(pieces))


def _theirs(rule: Rule, source: TensorSource, dtype: torch.dtype) -> Iterator[PlannedTensor]:
    spans = _inverse(rule.rows)
    for part in range(len(rule.theirs)):
        info = TensorInfo(rule.their_shape(part), dtype)
        for expert, name in enumerate(rule.their_names(part)):
            which = None if rule.num_experts is None else expert
            ours = [(rule.ours, rows) for rows in spans[part]]
            read = partial(_read, source, ours, info.shape, whole={rule.ours: rule.shape[0]}, expert=which)
            yield PlannedTensor(name, info, (rule.ours,), (Piece(info.shape[0], read),))


def _inverse(ours: Sequence[Rows]) -> Mapping[int, list[Rows]]:
    """For each part of theirs, in order, the rows of ours (part 0) that it is made of."""
    placed: dict[int, list[tuple[int, Rows]]] = defaultdict(list)
    at = 0
    for rows in ours:
        if rows.part is not None:
            placed[rows.part].append((rows.start, Rows(0, at, rows.count)))
        at += rows.count
    return {part: [rows for _, rows in sorted(found, key=lambda item: item[0])] for part, found in placed.items()}


def _read(
    source: TensorSource,
    spans: Sequence[tuple[str | None, Rows]],
    shape: Shape,
    *,
    whole: Mapping[str, int],
    expert: int | None = None,
    stacked: bool = False,
) -> Tensor:
    """[*shape] (with a 1 before, where `stacked`), put together from rows of tensors.

    Each tensor is read once, as far as it is needed: a source may have to read more than the rows it is asked for.

    Args:
        spans: a tensor's name and rows of it; None: zeros.
        whole: how many rows each tensor has.
        expert: the tensor is a stack of experts, and the rows are of this one.
    """
    needed: dict[str, list[Rows]] = defaultdict(list)
    for name, rows in spans:
        if name is not None:
            needed[name].append(rows)
    held = {name: _read_stretch(source, name, rows, whole[name], expert) for name, rows in needed.items()}
    [dtype] = {tensor.dtype for _, tensor in held.values()}
    parts = []
    for name, rows in spans:
        if name is None:
            parts.append(torch.zeros((rows.count, *shape[1:]), dtype=dtype))
        else:
            first, tensor = held[name]
            parts.append(tensor[rows.start - first : rows.start - first + rows.count])
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result[None] if stacked else result


def _read_stretch(
    source: TensorSource, name: str, wanted: Sequence[Rows], num_rows: int, expert: int | None
) -> tuple[int, Tensor]:
    """(its first row, the stretch of a tensor that all of `wanted` lie in)."""
    if expert is not None:
        return 0, source.read(name, slice(expert, expert + 1))[0]
    first, last = min(rows.start for rows in wanted), max(rows.start + rows.count for rows in wanted)
    if (first, last) == (0, num_rows):
        return 0, source.read(name)
    return first, source.read(name, slice(first, last))


def _filled(filler: Filler, dtype: torch.dtype) -> Tensor:
    return filler.make(filler.shape).to(dtype)


def _faults(tensors: Mapping[str, TensorInfo], expected: Mapping[str, Shape], *, extra: Sequence[str]) -> list[str]:
    faults = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    faults += [f"extra: {name} {list(tensors[name].shape)}" for name in extra]
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None:
            continue
        if found.shape != shape:
            faults.append(f"shape: {name} is {list(found.shape)}, expected {list(shape)}")
        if not found.dtype.is_floating_point or found.dtype.itemsize < 2:
            faults.append(f"dtype: {name} is {_names({found.dtype})}, expected plain floating point")
    return faults


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _misfit(what: str, faults: Sequence[str]) -> UserError:
    return UserError(
        "\n  ".join(
            [f"the weights do not fit {what} as its configuration describes it ({len(faults)} faults):", *faults]
        )
    )
