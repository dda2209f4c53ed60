"""What a benchmark prints: its settings, then one line per goal, `NAME VALUE UNIT goal GOAL ok|short`."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """A measured value and the bound it must keep; a value that is not a number keeps none.

    Attributes:
        name: one word.
        value, bound: in `unit`.
        relation: "<" where the value must be below the bound, ">" where above.
    """

    name: str
    value: float
    unit: str
    relation: Literal["<", ">"]
    bound: float

    @property
    def holds(self) -> bool:
        return self.value < self.bound if self.relation == "<" else self.value > self.bound

    def __str__(self) -> str:
        verdict = "ok" if self.holds else "short"
        return f"{self.name} {self.value:.4g} {self.unit} goal {self.relation}{self.bound:.4g} {verdict}"


def report(settings: Mapping[str, Any], goals: Sequence[Goal]) -> int:
    """Print settings and goals; the exit code: 0 only if there are goals and all hold."""
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": version("torch")}
    for name, value in {**settings, **machine}.items():
        print(f"{name}: {value}")
    for goal in goals:
        print(goal)
    return 0 if goals and all(goal.holds for goal in goals) else 1
