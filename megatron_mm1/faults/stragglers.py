"""Which ranks work much longer than the others that do the same work."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

LEAST = 0.1
"""Seconds above the others' median that are worth a line: less is noise, and costs little."""


@dataclass(frozen=True)
class Work:
    """What a rank says of its last step.

    Attributes:
        who: the rank, its host and process.
        peers: ranks with the same number do the same work; pipeline stages do not.
        seconds: it worked, waiting for other ranks left out.
    """

    who: str
    peers: int
    seconds: float


@dataclass(frozen=True)
class Straggler:
    """A rank that works longer than its peers; `median` is the others'."""

    work: Work
    median: float

    def __str__(self) -> str:
        return (
            f"{self.work.who} worked {self.work.seconds:.2f} s in this step, communication left out; the others with "
            f"the same work, {self.median:.2f} s (median)"
        )


def stragglers(works: Iterable[Work], *, factor: float) -> list[Straggler]:
    """Those above `factor` times the median of the others that do the same work, the slowest first."""
    groups = defaultdict(list)
    for work in works:
        groups[work.peers].append(work)
    found = []
    for group in groups.values():
        for place, work in enumerate(group):
            others = [other.seconds for other in group[:place] + group[place + 1 :]]
            if others and work.seconds > max(factor * (median := statistics.median(others)), median + LEAST):
                found.append(Straggler(work, median))
    return sorted(found, key=lambda straggler: straggler.median - straggler.work.seconds)
