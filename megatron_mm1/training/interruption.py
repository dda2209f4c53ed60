"""Ending before the last step because a signal asks for it: on every rank after the same step, with a checkpoint.

Schedulers send SIGTERM, or what a job asks for, before they take a machine away. It may reach one rank only, or all of
them at different steps.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch.distributed import ProcessGroup, ReduceOp, Work

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether a signal has arrived on any rank, agreed on once per step.

    The ranks exchange their answers on the host while the device computes the step, so nothing waits for the exchange;
    a signal that arrives after it has begun counts from the next step on.

    Attributes:
        received: the signal that this process has got.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._group: ProcessGroup | None = None
        self._exchange: tuple[torch.Tensor, Work | None] | None = None

    def connect(self) -> None:
        """Make the group that the ranks agree in; every rank calls it. Without it this process decides alone."""
        if torch.distributed.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def begin(self) -> None:
        """Begin to ask all ranks; every rank calls it once per step."""
        answer = torch.tensor([self.received is not None], dtype=torch.int32)
        work = None
        if self._group is not None:
            work = torch.distributed.all_reduce(answer, op=ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = answer, work

    def agreed(self) -> bool:
        """The answer to `begin`, the same on every rank: whether the run ends after this step."""
        assert self._exchange is not None
        answer, work = self._exchange
        if work is not None:
            work.wait()
        return bool(answer.item())

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self.received = signal.Signals(number)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note SIGTERM and SIGUSR1 while the block runs instead of ending the process; for the main thread."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.receive) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
