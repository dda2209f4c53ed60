"""A stopwatch that splits time among the parts of a training step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DATA, TOWER, DECODER, BUBBLE = "data wait", "tower", "decoder", "pipeline bubble"
OPTIMIZER, COLLECTIVES, OTHER = "optimizer", "collectives", "other"

PARTS = {
    DATA: "waiting for the loader's microbatches",
    TOWER: "vision tower and connector, forward and backward, what is recomputed included",
    DECODER: "embedding, decoder blocks and output layer, forward and backward, what is recomputed included",
    BUBBLE: "point-to-point sends and receives of a pipeline, and waiting for its other stages at the end",
    COLLECTIVES: "all other communication, whoever calls it, and waiting for the ranks that come late to it",
    OPTIMIZER: "gradient norm, clipping, update, and gradients set to zero",
    OTHER: "none of these: copies to the device, loss masking, division of gradients, the schedule's own work",
}
"""The parts and what each one is."""


class Clock:
    """Every moment while it runs is counted once: for the innermost region it is in, outside of all for `other`.

    A region ends when the device has finished what was started in it, so that its time is its own and no work overlaps
    with another's. Autograd calls hooks from a thread of its own while the one that called it waits, so that regions
    of both nest as if there were one.

    Args:
        synchronize: waits for the device.
        timer: seconds from some fixed moment on.

    Attributes:
        seconds: of each part, summed since the clock was made.
    """

    def __init__(self, synchronize: Callable[[], None], *, timer: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronize, self._timer = synchronize, timer
        self._regions: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without it, regions do nothing."""
        self._synchronize()
        self._since = self._timer()
        self._regions = [OTHER]
        try:
            yield
        finally:
            self._book()
            self._regions = []

    @contextmanager
    def region(self, part: str) -> Iterator[None]:
        """Count the block for `part`, but for regions inside it."""
        if not self._regions:
            yield
            return
        self._book()
        depth = len(self._regions)
        self._regions.append(part)
        try:
            yield
        finally:
            self._book()
            del self._regions[depth:]

    @contextmanager
    def communication(self, part: str) -> Iterator[bool]:
        """The same for a call that communicates, except inside another one, of which it is a part.

        Yields:
            whether it is the outer one and the clock runs.
        """
        if not self._regions or self._regions[-1] in (BUBBLE, COLLECTIVES):
            yield False
            return
        with self.region(part):
            yield True

    def switch(self, part: str) -> None:
        """From here on the innermost region counts for `part`."""
        if self._regions:
            self._book()
            self._regions[-1] = part

    def _book(self) -> None:
        self._synchronize()
        now = self._timer()
        self.seconds[self._regions[-1]] += now - self._since
        self._since = now
