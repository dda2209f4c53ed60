"""Steps that went wrong: a loss or gradient that is not finite, or a gradient norm far above the last ones.

Rules only: every rank is told the same numbers, and so comes to the same conclusion.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Action = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """A step whose update is not applied.

    Attributes:
        what: what is wrong, as a clause.
        action: what the policy asks for.
        loss, grad_norm: the step's.
        median: of the norms before it, where there are enough.
    """

    what: str
    action: Action
    loss: float
    grad_norm: float
    median: float | None = None


class AnomalyDetector:
    """Judges each step by the ones before it.

    Args:
        nonfinite: what to do where loss or gradient norm are not finite.
        spike: what to do where the norm is a spike; None: nothing is one.
        spike_factor: a spike is above so many times the median of the last norms.
        spike_window: how many norms that are; no spike is seen before.
        max_consecutive_skips: how many steps in a row may be skipped.
        norms: of the last updates of the run that goes on.
    """

    def __init__(
        self,
        *,
        nonfinite: Action,
        spike: Action | None,
        spike_factor: float,
        spike_window: int,
        max_consecutive_skips: int,
        norms: Iterable[float] = (),
    ) -> None:
        self._nonfinite, self._spike = nonfinite, spike
        self._factor, self._window = spike_factor, spike_window
        self._max_consecutive_skips = max_consecutive_skips
        self._skips = 0
        self._norms = deque(norms, maxlen=spike_window)

    @property
    def norms(self) -> tuple[float, ...]:
        """Gradient norms of the last updates, oldest first; empty where spikes are not looked for."""
        return tuple(self._norms)

    def judge(self, loss: float, grad_norm: float) -> Anomaly | None:
        """Call once per step, before the update; None: apply it."""
        anomaly = self._nonfinite_step(loss, grad_norm) or self._spike_of(loss, grad_norm)
        if anomaly is None:
            self._skips = 0
            if self._spike is not None:
                self._norms.append(grad_norm)
        return anomaly

    def may_skip(self) -> bool:
        """Count a skip; False: it is one too many in a row, and the run must end."""
        self._skips += 1
        return self._skips <= self._max_consecutive_skips

    def _nonfinite_step(self, loss: float, grad_norm: float) -> Anomaly | None:
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif not math.isfinite(grad_norm):
            what = f"the gradient norm is {grad_norm}"
        else:
            return None
        return Anomaly(what=what, action=self._nonfinite, loss=loss, grad_norm=grad_norm)

    def _spike_of(self, loss: float, grad_norm: float) -> Anomaly | None:
        if self._spike is None or len(self._norms) < self._window:
            return None
        median = statistics.median(self._norms)
        if grad_norm <= self._factor * median:
            return None
        what = f"the gradient norm {grad_norm:.4g} is more than {self._factor:g} times {median:.4g}"
        what += f", the median of the last {self._window} updates"
        return Anomaly(what=what, action=self._spike, loss=loss, grad_norm=grad_norm, median=median)
