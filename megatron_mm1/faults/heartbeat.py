"""The threads that exchange heartbeats: every rank's with rank 0's, over a connection of their own.

Once per interval a rank sends a line and waits for rank 0's answer; rank 0 judges (`liveness.RollCall`) and tells every
rank its verdict. A killed process's connection is closed by its kernel, which shows at once; a process or machine that
stands still is silent. Nothing here waits for the main thread, which may sit in a collective for ever: the thread that
has a verdict ends its process by `os._exit`.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_mm1.faults.liveness import (
    USER_ERROR_GRACE,
    RollCall,
    Status,
    Verdict,
    died,
    failed,
    met_user_error,
    no_heartbeat,
)
from megatron_mm1.faults.stacks import write_stacks

OWN_FAILURE = 1
"""Exit code of a rank whose own program raised an error; also Python's."""
_PRINT_GRACE = 2.0
"""Seconds that the other ranks leave it to rank 1 to print that rank 0 is gone."""
_FAREWELL_SECONDS = 2.0
"""How long rank 0 waits at the end for the others to hang up."""
_WRITING_SECONDS = 0.5
"""How long a rank that has written its stacks stays, so that the others are still where it left them when they do."""
_SEND_SECONDS = 2.0
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Parting:
    """How the main thread comes to its end: `error` is what it raised, in one line."""

    kind: Literal["done", "user error", "failed", "failed in collective"]
    error: str = ""


class Lines:
    """A connection that carries JSON, one message a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None
        self._buffer = b""
        connection.settimeout(_SEND_SECONDS)

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived since; call it when the socket is readable.

        Raises:
            OSError: the other side has closed the connection.
            ValueError: it does not speak JSON.
        """
        data = self.socket.recv(_LONGEST_LINE)
        if not data:
            raise ConnectionResetError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _LONGEST_LINE:
            raise ValueError("an endless line")
        return [json.loads(line) for line in lines]


class Watcher(threading.Thread):
    """What the two kinds of thread share.

    Args:
        status: where the main thread is.
        interval: seconds between heartbeats.
        silence_limit: seconds without a heartbeat after which a rank counts as dead.
        stacks: folder where ranks write their stacks down; None: they do not.
    """

    def __init__(
        self, status: Callable[[], Status], *, interval: float, silence_limit: float, stacks: Path | None
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.status, self.interval, self.silence_limit, self.stacks = status, interval, silence_limit, stacks
        self.parting: Parting | None = None
        self._wake, self._woken = socket.socketpair()
        self._error: BaseException | None = None

    def part(self, parting: Parting, *, error: BaseException | None = None) -> None:
        """The main thread's farewell; returns when the thread is over, after a few seconds at most.

        After an error in a collective it waits for the verdict, which ends the process.
        """
        self._error, self.parting = error, parting
        self._wake.send(b"!")
        is_waiting = parting.kind == "failed in collective"
        self.join(2 * self.silence_limit + _FAREWELL_SECONDS if is_waiting else 2 * _FAREWELL_SECONDS)

    def obey(self, verdict: Verdict) -> None:
        """Leave behind what a verdict asks this rank for."""
        status = self.status()
        if verdict.with_stacks and self.stacks is not None:
            write_stacks(self.stacks, status.rank, title=f"{status.who} {status.where}; {verdict.text}")
        if status.rank in verdict.shown_by:
            self.show()

    def show(self) -> None:
        """Print what this rank alone knows: its error, or else where its threads are."""
        if self._error is not None:
            traceback.print_exception(self._error)
        else:
            say(f"{self.status().who} is here:")
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)


class Follower(Watcher):
    """The thread of a rank other than 0.

    Args:
        connection: to rank 0.
        token: shows rank 0 that the connection is of this job.
        leader: rank 0's status until it is heard.
    """

    def __init__(
        self, status: Callable[[], Status], connection: socket.socket, *, token: str, leader: Status, **options: Any
    ) -> None:
        super().__init__(status, **options)
        self._lines, self._token, self._leader = Lines(connection), token, leader
        self._received: list[dict[str, Any]] = []

    def run(self) -> None:
        try:
            with contextlib.suppress(_Over):
                self._watch()
        except OSError:
            self._leader_died("its connection closed")
        finally:
            self._lines.socket.close()

    def _watch(self) -> None:
        while True:
            parting = self.parting
            self._lines.send(
                {
                    "token": self._token,
                    "status": asdict(self.status()),
                    "parting": None if parting is None else asdict(parting),
                }
            )
            asked = time.monotonic()
            while (message := self._next(asked + self.silence_limit)) and not self._heed(message):
                pass
            if message is None:
                self._leader_died(no_heartbeat(self.silence_limit))
            if parting is not None and parting.kind != "failed in collective":
                return
            while message := self._next(asked + self.interval, is_wakeable=True):
                self._heed(message)

    def _next(self, deadline: float, *, is_wakeable: bool = False) -> dict[str, Any] | None:
        """The next message of rank 0; None at the deadline, and when the main thread parts."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._lines.socket, selectors.EVENT_READ)
            if is_wakeable:
                selector.register(self._woken, selectors.EVENT_READ)
            while not self._received:
                ready = [key.fileobj for key, _ in selector.select(max(deadline - time.monotonic(), 0))]
                if self._lines.socket in ready:
                    self._received += self._lines.receive()
                elif ready:
                    self._woken.recv(64)
                    return None
                elif time.monotonic() >= deadline:
                    return None
        return self._received.pop(0)

    def _heed(self, message: dict[str, Any]) -> bool:
        """Does what rank 0 says; whether it was the answer to a heartbeat."""
        if "verdict" in message:
            verdict = Verdict(**message["verdict"])
            self.obey(verdict)
            if verdict.with_stacks:
                time.sleep(_WRITING_SECONDS)
            os._exit(verdict.exit_code)  # rank 0 has printed it
        if "left" in message:
            if message["left"] is not None:
                self._survive_user_error(met_user_error(self._leader, message["left"]))
            raise _Over
        self._leader = Status(**message["status"])
        return True

    def _survive_user_error(self, verdict: Verdict) -> None:
        """Rank 0 has met a `UserError`, which it prints; end if this rank does not end by itself."""
        if self.parting is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                selector.select(USER_ERROR_GRACE)
        if self.parting is None:
            self._end(verdict)
        if self.parting.kind == "failed in collective":
            os._exit(verdict.exit_code)

    def _leader_died(self, why: str) -> None:
        if self.parting is None or self.parting.kind == "failed in collective":
            self._end(died([self._leader], why, step=max(self._leader.step, self.status().step)))

    def _end(self, verdict: Verdict) -> NoReturn:
        if self.status().rank > 1:
            time.sleep(_PRINT_GRACE)
        say(verdict.text)
        os._exit(verdict.exit_code)


class Leader(Watcher):
    """Rank 0's thread.

    Args:
        listener: where the others connect.
        token: what they show.
        roll: what is known of them.
    """

    def __init__(
        self, status: Callable[[], Status], listener: socket.socket, *, token: str, roll: RollCall, **options: Any
    ) -> None:
        super().__init__(status, **options)
        self._listener, self._token, self._roll = listener, token, roll
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        heard = time.monotonic()
        while True:
            self._serve(self.interval)
            now = time.monotonic()
            if now - heard > self.silence_limit:  # this process was stopped: it knows nothing of the others
                self._end(died([self.status()], no_heartbeat(self.silence_limit), step=self.status().step))
            heard = now
            self._roll.hear(self.status(), now=now)
            match self.parting:
                case Parting("done" | "user error" as kind, error):
                    self._farewell({"left": error if kind == "user error" else None})
                    return
                case Parting("failed", error):
                    self._end(failed(self.status(), error), exit_code=OWN_FAILURE)
                case Parting("failed in collective", error):
                    self._roll.fail_in_collective(0, error, now=now)
            verdict = self._roll.verdict(now)
            if verdict is not None:
                self._end(verdict)

    def _serve(self, seconds: float) -> None:
        """Wait for events, for `seconds` at most, and deal with those there are."""
        answer = {"status": asdict(self.status())}
        for key, _ in self._selector.select(seconds):
            if key.data is not None:
                self._read(key.data, answer)
            elif key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                self._selector.register(connection, selectors.EVENT_READ, Lines(connection))
            else:
                self._woken.recv(64)

    def _read(self, lines: Lines, answer: dict[str, Any]) -> None:
        try:
            for message in lines.receive():
                if message.get("token") != self._token:
                    raise ConnectionRefusedError
                self._note(lines, message)
                lines.send(answer)
        except (OSError, ValueError, AttributeError):  # closed; or a stranger's, such as a port scanner's
            self._hang_up(lines)

    def _note(self, lines: Lines, message: dict[str, Any]) -> None:
        now, status = time.monotonic(), Status(**message["status"])
        rank = lines.rank = status.rank
        self._roll.hear(status, now=now)
        if message["parting"] is None:
            return
        match Parting(**message["parting"]):
            case Parting("done"):
                self._roll.leave(rank, None, now=now)
            case Parting("user error", error):
                self._roll.leave(rank, error, now=now)
            case Parting("failed", error):
                self._roll.fail(rank, error)
            case Parting("failed in collective", error):
                self._roll.fail_in_collective(rank, error, now=now)

    def _hang_up(self, lines: Lines) -> None:
        self._selector.unregister(lines.socket)
        lines.socket.close()
        if lines.rank is not None:
            self._roll.lose(lines.rank)

    def _end(self, verdict: Verdict, *, exit_code: int | None = None) -> NoReturn:
        stacks = f"; the stacks of every rank are in {self.stacks}" if verdict.with_stacks and self.stacks else ""
        say(verdict.text + stacks)
        self.obey(verdict)  # before the others end, which breaks the collective that this rank shall be seen in
        self._farewell({"verdict": asdict(verdict)})
        os._exit(verdict.exit_code if exit_code is None else exit_code)

    def _farewell(self, message: dict[str, Any]) -> None:
        """Tell every rank, and read until they have hung up: closing earlier could lose what was sent."""
        self._selector.unregister(self._listener)
        self._listener.close()
        for lines in self._connections():
            with contextlib.suppress(OSError):
                lines.send(message)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._connections() and time.monotonic() < deadline:
            self._serve(max(deadline - time.monotonic(), 0))

    def _connections(self) -> list[Lines]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]


class _Over(Exception):
    """Nothing left to watch."""


def say(text: str) -> None:
    """Print a line past Python's buffers, whose locks the main thread may hold."""
    progress_bar = "\n" if os.isatty(2) else ""
    os.write(2, f"{progress_bar}mm1: {text}\n".encode())
