"""Ranks of a process group that is not there, for what only asks a group who is who."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """One rank of a group of `count`."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count
