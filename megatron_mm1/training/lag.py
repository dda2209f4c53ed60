"""Comparison of the ranks' own work in a step: who lags behind is named."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.faults.communication import timed_communication
from megatron_mm1.faults.stragglers import Straggler, Work, stragglers


class LagMeter:
    """How long this rank works, without what it spends in communication; every rank has one.

    Args:
        who: this rank.
        factor: a rank lags behind that works so many times as long as the others of its pipeline stage; 0: nothing is
            measured.
    """

    def __init__(self, who: str, *, factor: float, pg_collection: ProcessGroupCollection) -> None:
        self._who, self._factor, self._groups = who, factor, pg_collection
        self._seconds: float | None = None

    @contextmanager
    def measuring(self, wanted: bool) -> Iterator[None]:
        """Measure the block, if that is wanted and there is another rank to compare with."""
        self._seconds = None
        if not (wanted and self._factor and torch.distributed.get_world_size() > 1):
            yield
            return
        began = time.perf_counter()
        with timed_communication() as stopwatch:
            yield
        self._seconds = time.perf_counter() - began - stopwatch.seconds()

    def stragglers(self) -> list[Straggler]:
        """The ranks that lagged behind in the last block, if that was measured; every rank calls this."""
        if self._seconds is None:
            return []
        mine = Work(self._who, peers=self._groups.pp.rank(), seconds=self._seconds)
        works: list[Work] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(works, mine)
        return stragglers(works, factor=self._factor)
