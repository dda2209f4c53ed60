"""`mm1 convert verify`: two folders of weights, in any two formats and layouts, tensor by tensor."""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mm1.checkpoint.format import OPTIMIZER_PREFIX
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.checkpoint.tensors import Subset, TensorInfo, TensorSource
from megatron_mm1.checkpoint.weights import Weights, open_weights
from megatron_mm1.config import ModelConfig
from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.config.presets import preset
from megatron_mm1.errors import UserError

OPTIMIZER = "optimizer"
_BLOCK = 1 << 22  # elements compared at a time


def verify_main(args: Namespace) -> bool:
    """Whether two folders hold the same; prints every difference.

    Args:
        args: `a` and `b`, the folders; `tolerance`, the greatest absolute difference that passes; `component`, the
            parts of the model to compare, or "optimizer" (None: all, and the optimizer's state where both have it).
    """
    first, second = _open_both(args)
    parts = args.component or [*COMPONENTS, *([OPTIMIZER] if _has_state(first) and _has_state(second) else [])]
    prefixes = tuple({**COMPONENTS, OPTIMIZER: OPTIMIZER_PREFIX}[part] for part in parts)
    ours, theirs = (Subset(weights.source, prefixes) for weights in (first, second))
    if not ours.tensors and not theirs.tensors:
        raise UserError(f"neither {args.a} nor {args.b} holds any of {', '.join(parts)}")
    differences = 0
    for difference in compare(ours, theirs, tolerance=args.tolerance):
        print(difference)
        differences += 1
    for weights in (first, second):
        if weights.checkpoint is not None:
            weights.checkpoint.verify()
    names = set(ours.tensors) | set(theirs.tensors)
    left_out = "" if OPTIMIZER in parts or not (_has_state(first) or _has_state(second)) else ", optimizer left out"
    print(f"{len(names)} tensors compared ({', '.join(parts)}{left_out}): {differences or 'no'} differences")
    return differences == 0


@dataclass(frozen=True)
class Difference:
    """What is not the same about a tensor."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def compare(ours: TensorSource, theirs: TensorSource, *, tolerance: float = 0.0) -> Iterator[Difference]:
    """Every difference of two sources, A and B. Of either, a block of rows is in memory at a time.

    Args:
        tolerance: greatest absolute difference of two elements that passes; above 0, types may differ. Elements that
            are not a number on both sides are equal.
    """
    for name, info in ours.tensors.items():
        other = theirs.tensors.get(name)
        if other is None:
            yield Difference(name, f"missing in B (A: {_describe(info)})")
        elif info.shape != other.shape:
            yield Difference(name, f"shape {list(info.shape)} in A, {list(other.shape)} in B")
        elif info.dtype != other.dtype and not tolerance:
            yield Difference(name, f"type {info.dtype} in A, {other.dtype} in B")
        else:
            count, largest = _unequal(ours, theirs, name, tolerance=tolerance)
            if count:
                total = torch.Size(info.shape).numel()
                yield Difference(name, f"{count:,} of {total:,} elements differ, by {largest:.3g} at most")
    for name, info in theirs.tensors.items():
        if name not in ours.tensors:
            yield Difference(name, f"missing in A (B: {_describe(info)})")


def _unequal(ours: TensorSource, theirs: TensorSource, name: str, *, tolerance: float) -> tuple[int, float]:
    """How many elements differ by more than `tolerance`, and the largest difference."""
    info = ours.tensors[name]
    if not info.shape:
        return _difference(ours.read(name), theirs.read(name), tolerance=tolerance)
    rows = info.shape[0]
    step = max(1, _BLOCK * rows // max(1, torch.Size(info.shape).numel()))
    count, largest = 0, 0.0
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        found, by = _difference(ours.read(name, block), theirs.read(name, block), tolerance=tolerance)
        count, largest = count + found, max(largest, by)
    return count, largest


def _difference(ours: Tensor, theirs: Tensor, *, tolerance: float) -> tuple[int, float]:
    if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
        return 0, 0.0
    a, b = ours.double(), theirs.double()
    distance = (a - b).abs_()
    distance[(a == b) | (a.isnan() & b.isnan())] = 0.0  # infinities, which have no distance, and what is no number
    distance[distance.isnan()] = math.inf
    return int((distance > tolerance).sum()), float(distance.max()) if distance.numel() else 0.0


def _open_both(args: Namespace) -> tuple[Weights, Weights]:
    """An MM1 checkpoint says what the other folder leaves open, such as the number of patches of a tower."""
    base: ModelConfig = preset("mm1-tiny").model
    for path in (args.a, args.b):
        try:
            base = MM1Checkpoint(path).metadata.mm1_config().model
        except UserError:
            continue
    return open_weights(args.a, base=base), open_weights(args.b, base=base)


def _has_state(weights: Weights) -> bool:
    return any(name.startswith(OPTIMIZER_PREFIX) for name in weights.source.tensors)


def _describe(info: TensorInfo) -> str:
    return f"{list(info.shape)} {str(info.dtype).removeprefix('torch.')}"
