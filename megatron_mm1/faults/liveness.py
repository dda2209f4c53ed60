"""Which rank is dead, at fault or behind, judged from what each last said of itself.

Rules only: no socket and no clock; times are passed in, in seconds of rank 0's monotonic clock.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mm1.faults.stacks import waits_for_others

PEER_FAILED = 3
"""Exit code of a rank that ends because another one is dead or has failed, or because nothing moves any more."""
USER_ERROR = 2
"""Exit code of a rank that ends because another one met a `UserError`: that one's own."""

USER_ERROR_GRACE = 15.0
"""Seconds the others have to end by themselves after one met a `UserError`: mostly all meet it, and the command line
takes its time to print it."""

_UNLIMITED = "checkpoint"
_NAMED_AT_MOST = 8


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a rank says of itself.

    Attributes:
        step: the optimizer step it works on, from 1, or after which it validates or saves.
        phase: what it does there.
        moves: how often step or phase have changed; all ranks go through the same ones, so fewer moves are behind.
        settled: it has done a step. Before that, kernels compile and data is built.
        place: where in the program its main thread stands (`stacks.place_of`).
    """

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = "start"
    moves: int = 0
    settled: bool = False
    place: str = ""

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        return f"at step {self.step} (phase {self.phase})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the job ends.

    Attributes:
        text: one line for the user.
        shown_by: ranks that print what they know besides: the traceback of their error, or their threads' stacks.
        exit_code: of every rank that ends because of it.
        with_stacks: every rank writes down where its threads stand.
    """

    text: str
    shown_by: tuple[int, ...] = ()
    exit_code: int = PEER_FAILED
    with_stacks: bool = False


def died(dead: Iterable[Status], why: str, *, step: int) -> Verdict:
    """Where the dead were last heard may be a heartbeat ago; `step` is where the others are, who cannot get past it."""
    dead = list(dead)
    last = _listed(f"{status.where}" for status in dead)
    return Verdict(text=f"{_listed(status.who for status in dead)} died at step {step}: {why}; last heard {last}")


def failed(status: Status, message: str) -> Verdict:
    return Verdict(text=f"{status.who} failed {status.where}: {message}")


def met_user_error(status: Status, message: str) -> Verdict:
    return Verdict(text=f"{status.who} ended {status.where} with an error: {message}", exit_code=USER_ERROR)


def no_heartbeat(seconds: float) -> str:
    return f"no heartbeat for {seconds:.0f} s"


class RollCall:
    """What rank 0 knows of all ranks, itself included.

    Args:
        world_size: number of ranks.
        interval: seconds between a rank's heartbeats.
        silence_limit: seconds after which a rank that is not heard counts as dead.
        standstill_limit: seconds that ranks may stay where they are once they have done a step.
        now: time of the start.
    """

    def __init__(
        self, world_size: int, *, interval: float, silence_limit: float, standstill_limit: float, now: float
    ) -> None:
        self.interval, self.silence_limit, self.standstill_limit = interval, silence_limit, standstill_limit
        self._statuses = {rank: Status(rank=rank, host="unknown", pid=0) for rank in range(world_size)}
        self._heard = dict.fromkeys(range(world_size), now)
        self._moved = now
        self._lost: int | None = None
        self._failed: Verdict | None = None
        self._user_error: tuple[float, Verdict] | None = None
        self._broken_collective: tuple[float, Status, str] | None = None

    def hear(self, status: Status, *, now: float) -> None:
        """A heartbeat."""
        if status.moves != self._statuses[status.rank].moves:
            self._moved = now
        self._statuses[status.rank] = status
        self._heard[status.rank] = now

    def lose(self, rank: int) -> None:
        """A rank's connection closed; nothing to say if it had left, or after another cause."""
        if rank in self._statuses and self._failed is None and self._lost is None:
            self._lost = rank

    def fail(self, rank: int, message: str) -> None:
        """A rank raised an error that came from no collective, so the error is its own."""
        if self._lost is None and self._failed is None:
            self._failed = failed(self._statuses[rank], message)

    def fail_in_collective(self, rank: int, message: str, *, now: float) -> None:
        """A collective raised an error on a rank: perhaps because a peer is dead, which then shows within the limit."""
        self._broken_collective = self._broken_collective or (now, self._statuses[rank], message)

    def leave(self, rank: int, user_error: str | None, *, now: float) -> None:
        """A rank ends in an orderly way, with or without a `UserError`, and is heard no more."""
        status = self._statuses.pop(rank)
        del self._heard[rank]
        if user_error is not None:
            self._user_error = self._user_error or (now, met_user_error(status, user_error))

    def verdict(self, now: float) -> Verdict | None:
        """Why the job must end now; None while it need not. Certain causes come before what may be their effects."""
        if not self._statuses:
            return None
        return (
            self._failed
            or self._loss()
            or self._silence(now)
            or self._lone_user_error(now)
            or self._failed_collective()
            or self._standstill(now)
        )

    def _loss(self) -> Verdict | None:
        return None if self._lost is None else self._died([self._lost], "its connection closed")

    def _silence(self, now: float) -> Verdict | None:
        if not any(now - heard > self.silence_limit for heard in self._heard.values()):
            return None
        # A node goes down with all its ranks, which were last heard at different moments.
        limit = self.silence_limit - 2 * self.interval
        silent = [rank for rank, heard in self._heard.items() if now - heard > limit]
        return self._died(silent, no_heartbeat(self.silence_limit))

    def _died(self, ranks: Iterable[int], why: str) -> Verdict:
        step = max(status.step for status in self._statuses.values())
        return died((self._statuses[rank] for rank in ranks), why, step=step)

    def _lone_user_error(self, now: float) -> Verdict | None:
        if self._user_error is None:
            return None
        since, verdict = self._user_error
        return verdict if self._broken_collective or now - since > USER_ERROR_GRACE else None

    def _failed_collective(self) -> Verdict | None:
        """Judged only when every rank has sent a heartbeat since, for then none is dead."""
        if self._broken_collective is None:
            return None
        since, status, message = self._broken_collective
        if min(self._heard.values()) <= since + self.interval:
            return None
        text = f"a collective failed on {status.who} {status.where}: {message}; {self._order()}"
        return Verdict(text=text, shown_by=(status.rank,), with_stacks=True)

    def _standstill(self, now: float) -> Verdict | None:
        statuses = self._statuses.values()
        if now - self._moved <= self.standstill_limit:
            return None
        if not all(status.settled and status.phase != _UNLIMITED for status in statuses):
            return None
        late = self._behind() or self._elsewhere() or self._statuses.values()
        return Verdict(
            text=f"no progress for {self.standstill_limit:.0f} s: {self._order()}",
            shown_by=tuple(status.rank for status in late)[:_NAMED_AT_MOST],
            with_stacks=True,
        )

    def _behind(self) -> list[Status]:
        """The ranks that have made the fewest moves; none if all have made equally many."""
        moves = [status.moves for status in self._statuses.values()]
        return [status for status in self._statuses.values() if status.moves == min(moves) < max(moves)]

    def _elsewhere(self) -> list[Status]:
        """The ranks that are not where the others wait for them: not in communication, where others are; else not where
        most are. With collectives of GPUs all may stand in their wait for the device."""
        statuses = list(self._statuses.values())
        busy = [status for status in statuses if not waits_for_others(status.place)]
        if 0 < len(busy) < len(statuses):
            return busy
        (place, count), *_ = Counter(status.place for status in statuses).most_common()
        return [status for status in statuses if status.place != place] if 2 * count > len(statuses) else []

    def _order(self) -> str:
        """Who is behind, in words."""
        behind, first = self._behind(), max(self._statuses.values(), key=lambda status: status.moves)
        if not behind:
            places = Counter(status.place for status in self._statuses.values() if status.place).most_common()
            text = f"all ranks are {first.where}"
            if elsewhere := self._elsewhere():
                late = _listed(f"{status.who} {status.place}" for status in elsewhere)
                waiting = next(place for place, _ in places if place not in {status.place for status in elsewhere})
                return f"{text}, most {waiting}; elsewhere: {late}"
            return f"{text}: {_listed(f'{count} {place}' for place, count in places)}" if places else text
        return f"behind: {_listed(f'{status.who} {status.where}' for status in behind)}; foremost: {first.where}"


def _listed(items: Iterable[str]) -> str:
    every = list(items)
    rest = len(every) - _NAMED_AT_MOST
    return ", ".join([*every[:_NAMED_AT_MOST], *([f"and {rest} more"] if rest > 0 else [])])
