"""What a probe found, and how probes are kept from harming each other."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class State(StrEnum):
    OK = "ok"
    LIMITED = "limited"  # works, and something is lost
    MISSING = "missing"
    FAILED = "failed"  # is there and does not work


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked for.
        found: what is there, or why it does not work.
        costs: what cannot be done, or what is slower; "" where nothing is.
        fix: a command, or what else to do about it.
        facts: what the judgement of the machine and `--json` want to know.
    """

    name: str
    state: State
    found: str
    costs: str = ""
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return self.state in (State.OK, State.LIMITED)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to look at.

    Attributes:
        run_dir: where a run would write.
        corpus: where the demo corpus is, or would be built.
        timeout_seconds: limit of one command.
    """

    run_dir: Path
    corpus: Path
    timeout_seconds: float


Probe = Callable[[Settings], list[Finding]]


class ProbeError(Exception):
    """What a probe asked did not answer as it should; the message says why, in a few words."""


def output_of(command: Sequence[str], *, timeout_seconds: float) -> str:
    """What a command prints, without its standard error.

    Raises:
        FileNotFoundError: there is no such command.
        ProbeError: it failed, or did not end in time; then it and what it has started are killed.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        # Not waited for: a process that hangs in a driver does not die of the signal either.
        raise ProbeError(f"{command[0]} did not answer within {timeout_seconds:g} s") from None
    if process.returncode < 0:
        raise ProbeError(f"{command[0]} was ended by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        said = (errors.strip() or output.strip() or "nothing").splitlines()[-1]
        raise ProbeError(f"{command[0]} failed with exit code {process.returncode}: {said}")
    return output


def run_probes(probes: Mapping[str, Probe], settings: Settings) -> list[Finding]:
    """Runs all probes at the same time; one that raises, or hangs past its own limits, is a line that says so."""
    results: dict[str, list[Finding]] = {}

    def run(name: str, probe: Probe) -> None:
        try:
            results[name] = probe(settings)
        except Exception as error:
            reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
            results[name] = [_failed(name, reason)]

    # Not a pool: the process must be able to end while a thread hangs, as on a file system that does not answer.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in probes.items()]
    for thread in threads:
        thread.start()
    limit = 5 * settings.timeout_seconds  # no probe asks more than four things that can hang
    for thread in threads:
        thread.join(timeout=limit)
    findings: list[Finding] = []
    for name in probes:
        findings += results.get(name) or [_failed(name, f"no answer within {limit:g} s")]
    return findings


def _failed(name: str, reason: str) -> Finding:
    return Finding(name=name, state=State.FAILED, found=reason)
