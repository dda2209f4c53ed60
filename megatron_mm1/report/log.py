"""What a run wrote down: `log.jsonl`, as lines of figures by step."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm1.errors import UserError

LOG = "log.jsonl"
Line = Mapping[int, float]
"""A figure by step."""


@dataclass(frozen=True)
class RunLog:
    """A run's records.

    Attributes:
        records: by kind and step; of a step that was taken again the later one.
        unreadable: lines that were passed over: the last of a run that is still writing, or damaged ones.
    """

    records: Mapping[str, Mapping[int, Mapping[str, Any]]]
    unreadable: int

    def of_kind(self, kind: str) -> Mapping[int, Mapping[str, Any]]:
        return self.records.get(kind, {})

    def names(self, kind: str) -> list[str]:
        """Figures of a kind, in the order they first came."""
        return list(dict.fromkeys(name for figures in self.of_kind(kind).values() for name in figures))

    def line(self, kind: str, name: str) -> Line:
        """A figure by step; steps at which it was no finite number are left out."""
        values = ((step, figures.get(name)) for step, figures in sorted(self.of_kind(kind).items()))
        return {step: value for step, value in values if isinstance(value, int | float)}

    def last(self, kind: str, name: str) -> float | None:
        return last_of(self.line(kind, name))


def last_of(line: Line) -> float | None:
    """The figure at the latest step; None where there is none."""
    return line[max(line)] if line else None


def read_log(run: Path) -> RunLog:
    """Raises `UserError` where there is no log, or nothing in it."""
    try:
        lines = (run / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{run} is no run: it has no {LOG} ({error.strerror})") from None
    records: dict[str, dict[int, Mapping[str, Any]]] = {}
    parsed = list(_parsed(lines))
    for kind, step, figures in parsed:
        of_kind = records.setdefault(kind, {})
        of_kind.pop(step, None)
        of_kind[step] = figures
    if not parsed:
        raise UserError(f"{run / LOG} is empty: the run has not logged anything yet")
    return RunLog(records, len(lines) - len(parsed))


def _parsed(lines: list[str]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    for line in lines:
        try:
            record = json.loads(line)
            kind, step = record.pop("kind"), record.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        if isinstance(kind, str) and isinstance(step, int):
            yield kind, step, record
