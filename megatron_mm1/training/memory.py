"""Memory of a run: what was planned, said before it starts, and beside it what was measured after its first steps."""

import resource
import sys

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.errors import UserError
from megatron_mm1.parallel.device import device
from megatron_mm1.planning.memory import GIB, RankMemory, plan_memory

STEPS = 10
"""Steps of a process after which it measures: the first ones have allocated what all of them need."""


class MemoryWatch:
    """The plan, and when to measure."""

    def __init__(self, config: MM1Config, *, pg_collection: ProcessGroupCollection) -> None:
        self._groups = pg_collection
        self._steps = 0
        self.plan: tuple[RankMemory, ...] = ()
        self.problem = ""
        try:
            self.plan = plan_memory(config, world_size=torch.distributed.get_world_size())
        except UserError as error:  # a tower or a connector of the user's own
            self.problem = str(error)

    def introduction(self) -> list[str]:
        """The plan, a line for each place in the pipeline that differs from the one before."""
        if not self.plan:
            return [f" memory per rank is not planned: {self.problem}"]
        lines = []
        for rank, memory in enumerate(self.plan):
            if rank == 0 or memory != self.plan[rank - 1]:
                place = f" at pipeline rank {rank}" if len(self.plan) > 1 else ""
                lines.append(f" planned memory per rank{place}: {memory.total / GIB:.2f} GiB: {memory}")
        return lines

    def step(self) -> dict[str, float]:
        """Counts a step; every rank calls it.

        Returns:
            After `STEPS` of them GiB `planned` and `measured` by pipeline rank, otherwise nothing. Measured is the most
            that a rank has taken: on a GPU what torch allocated, on a CPU all of the process, libraries and data too.
        """
        self._steps += 1
        if self._steps != STEPS:
            return {}
        measured = torch.zeros(self._groups.pp.size(), dtype=torch.float64, device=device())
        measured[self._groups.pp.rank()] = peak_memory() / GIB
        torch.distributed.all_reduce(measured, op=torch.distributed.ReduceOp.MAX)
        figures = {f"planned {rank}": memory.total / GIB for rank, memory in enumerate(self.plan)}
        return figures | {f"measured {rank}": size for rank, size in enumerate(measured.tolist())}


def described(figures: dict[str, float]) -> str:
    """What `MemoryWatch.step` returns as a line."""
    how = "allocated by torch" if torch.cuda.is_available() else "resident set of the process, libraries included"
    ranks = [name.removeprefix("measured ") for name in figures if name.startswith("measured ")]
    pairs = []
    for rank in ranks:
        planned = f"{figures[f'planned {rank}']:.2f}" if f"planned {rank}" in figures else "not"
        place = f"at pipeline rank {rank} " if len(ranks) > 1 else ""
        pairs.append(f"{place}{planned} planned, {figures[f'measured {rank}']:.2f} measured")
    return f" peak memory per rank after {STEPS} steps, GiB: {'; '.join(pairs)} ({how})"


def peak_memory() -> int:
    """Bytes that this process has taken at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
