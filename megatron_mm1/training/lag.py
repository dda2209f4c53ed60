"""Comparison of the ranks' own work in a step: who lags behind is named."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.faults.communication import Stopwatch, timed_communication
from megatron_mm1.faults.stragglers import Straggler, Work, stragglers


@contextmanager
def measured(wanted: bool) -> Iterator[Stopwatch]:
    """A stopwatch of the communication in the block, which stands still unless it is wanted."""
    if not wanted:
        yield Stopwatch()
        return
    with timed_communication() as stopwatch:
        yield stopwatch


def lagging_ranks(seconds: float, *, who: str, factor: float, groups: ProcessGroupCollection) -> list[Straggler]:
    """The ranks that worked more than `factor` times as long as the others of their pipeline stage.

    Args:
        seconds: this rank's own work in the step; every rank calls this.
        who: this rank.
    """
    mine = Work(who, peers=groups.pp.rank(), seconds=seconds)
    works: list[Work] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(works, mine)
    return stragglers(works, factor=factor)
