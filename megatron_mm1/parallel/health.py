"""`mm1 health`: what every node of a job computes and sends, measured in seconds, before it is trusted with days.

One slow node makes every step slow, since all wait for it. Each is compared with the median of the others'
figures, so nothing has to be known of the machine. What a rank dies of, or hangs in, is reported with its host's name
by the ranks that watch each other (`faults/`).
"""

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mm1.faults.watch import Pulse, watched
from megatron_mm1.parallel.device import device
from megatron_mm1.parallel.groups import initialize_process_group

REPEATS = 5
"""Measurements, of which the best counts: others on the machine disturb some, a slow node is slow in all."""
_MINUTES = 2
_SILENCE_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
        matrix: rows and columns of the two factors of a product, a multiple of 64.
        megabytes: sent by each rank in an all-reduce.
        dtype: of both.
    """

    matrix: int
    megabytes: int
    dtype: torch.dtype


def default_sizes() -> Sizes:
    """A product takes a GPU some milliseconds, and an all-reduce is long enough for its bandwidth to count."""
    if device().type == "cuda":
        return Sizes(matrix=8192, megabytes=256, dtype=torch.bfloat16)
    return Sizes(matrix=512, megabytes=4, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a rank, or of a node by its slowest rank; None where there is nobody to exchange with.

    Attributes:
        product: TFLOP/s of a matrix product.
        inside: GB/s of an all-reduce among the ranks of the node, in the sense of nccl-tests' bus bandwidth.
        between: the same among the ranks of the node and of a neighbour, whichever of two goes better: a slow
            node is slow with both, and each of its neighbours has another one.
        is_right: product and sums were what they must be.
    """

    product: float
    inside: float | None
    between: float | None
    is_right: bool


UNITS = {"product": "TFLOP/s", "inside": "GB/s inside the node", "between": "GB/s between nodes"}


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What does the work that is measured."""

    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    all_reduce: Callable[[Tensor, ProcessGroup], None] = lambda tensor, group: dist.all_reduce(tensor, group=group)


def health_main(*, least_share: float) -> bool:
    """Measure every node of the job, print the rates, and name nodes that are unfit; the whole of `mm1 health`.

    Args:
        least_share: a node with less than this share of the median of any rate is unfit.

    Returns:
        Whether every node is fit, the same on every rank.
    """
    store = initialize_process_group(timeout_minutes=_MINUTES)
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        with watched(
            store,
            rank=rank,
            world_size=world_size,
            silence_limit=_SILENCE_SECONDS,
            standstill_limit=60 * _MINUTES - 5,
        ) as pulse:
            nodes = measure(socket.gethostname(), sizes=default_sizes(), pulse=pulse)
            problems = unfit(nodes, least_share=least_share)
            if rank == 0:
                print(table(nodes), *problems, sep="\n", flush=True)
            dist.barrier()
        return not problems
    finally:
        dist.destroy_process_group()


def measure(
    host: str, *, sizes: Sizes, pulse: Pulse | None = None, instruments: Instruments | None = None
) -> dict[str, Rates]:
    """The rates of every node by its name; every rank calls it, and gets the same.

    Args:
        host: name of this rank's node.
        pulse: is told what is being measured.
    """
    pulse, instruments = pulse or Pulse(), instruments or Instruments()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    ranks = {name: [rank for rank, other in enumerate(hosts) if other == name] for name in dict.fromkeys(hosts)}

    pulse.enter("step", step=0)  # what follows may not stand still
    product, is_right = _product_rate(sizes, instruments)
    inside: float | None = None
    between: list[float] = []
    alone: list[tuple[str, ...]] = [(name,) for name in ranks]
    for teams in [alone, *rounds(list(ranks))]:
        pulse.enter(f"all-reduce of {len(teams[0])} nodes", step=0)
        groups: list[Any] = [dist.new_group([rank for name in team for rank in ranks[name]]) for team in teams]
        for team, group in zip(teams, groups, strict=True):
            if host in team and group.size() > 1:
                rate, sum_is_right = _bandwidth(group, sizes, instruments)
                is_right &= sum_is_right
                if len(team) == 1:
                    inside = rate
                else:
                    between.append(rate)
    pulse.enter("end", step=0)

    mine = Rates(product=product, inside=inside, between=max(between, default=None), is_right=is_right)
    everyone: list[Rates] = [mine] * len(hosts)
    dist.all_gather_object(everyone, mine)
    return {name: _slowest([everyone[rank] for rank in members]) for name, members in ranks.items()}


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Every node with the one after it in a ring, in rounds in which none is in two pairs."""
    count = len(nodes)
    ring: list[tuple[str, ...]] = [(nodes[i], nodes[(i + 1) % count]) for i in range(count if count > 2 else count - 1)]
    last = [ring.pop()] if len(ring) % 2 and len(ring) > 1 else []
    return [pairs for pairs in (ring[::2], ring[1::2], last) if pairs]


def unfit(nodes: Mapping[str, Rates], *, least_share: float) -> list[str]:
    """A sentence for each node that computes wrong results, or less than a share of a rate's median."""
    problems = [f"node {name} is faulty: its results are wrong" for name, rates in nodes.items() if not rates.is_right]
    for rate, unit in UNITS.items():
        values = {name: value for name, rates in nodes.items() if (value := getattr(rates, rate)) is not None}
        median = statistics.median(values.values()) if values else 0.0
        problems += [
            f"node {name} is slow: {value:.3g} {unit}, {value / median:.0%} of the median {median:.3g}"
            for name, value in values.items()
            if value < least_share * median
        ]
    return problems


def table(nodes: Mapping[str, Rates]) -> str:
    """A line per node."""

    def cell(rates: Rates, rate: str) -> str:
        value = getattr(rates, rate)
        return "" if value is None else f" | {value:.3g} {UNITS[rate]}"

    return "\n".join(name + "".join(cell(rates, rate) for rate in UNITS) for name, rates in nodes.items())


def _slowest(ranks: Sequence[Rates]) -> Rates:
    def least(rate: str) -> float | None:
        return min((value for rank in ranks if (value := getattr(rank, rate)) is not None), default=None)

    rates = {field.name: least(field.name) for field in fields(Rates) if field.name in UNITS}
    return Rates(**rates, is_right=all(rank.is_right for rank in ranks))  # type: ignore[arg-type]


def _product_rate(sizes: Sizes, instruments: Instruments) -> tuple[float, bool]:
    """(TFLOP/s, whether the product is right): of ones with columns that have 1 in 64 ones, exact in every type."""
    size = sizes.matrix
    ones = torch.ones(size, size, dtype=sizes.dtype, device=device())
    places = torch.arange(size, device=device())
    columns = ((places[:, None] + places[None, :]) % 64 == 0).to(sizes.dtype)
    result = instruments.product(ones, columns)
    is_right = bool((result == size // 64).all())
    return 2e-12 * size**3 / _best_seconds(lambda: instruments.product(ones, columns)), is_right


def _bandwidth(group: ProcessGroup, sizes: Sizes, instruments: Instruments) -> tuple[float, bool]:
    """(GB/s, whether the sum is right) of an all-reduce in a group of this rank's."""
    count = group.size()
    numbers = torch.ones(sizes.megabytes * 10**6 // sizes.dtype.itemsize, dtype=sizes.dtype, device=device())
    instruments.all_reduce(numbers, group)
    is_right = bool((numbers == count).all())
    numbers.zero_()  # sums of sums would overflow
    seconds = _best_seconds(lambda: instruments.all_reduce(numbers, group))
    return 2 * (count - 1) / count * sizes.megabytes / 1000 / seconds, is_right


def _best_seconds(action: Callable[[], object]) -> float:
    def timed() -> float:
        started = time.perf_counter()
        action()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return min(timed() for _ in range(REPEATS))
