"""What a comparison found: as a table, in Markdown and in JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FLOOR = 1e-6
"""A parameter whose gradient is smaller than this share of the whole gradient is compared with that share instead."""


@dataclass(frozen=True)
class Bounds:
    """How far a layout may be from one process.

    Attributes:
        tensor: relative error of a parameter's gradient or update, and of the global gradient norm.
        rounding: share of a weight by which its update may be off in any case: the precision resolves no better.
    """

    tensor: float = 1e-4
    rounding: float = 1e-7

    @property
    def loss(self) -> float:
        return self.tensor / 10


@dataclass(frozen=True)
class Finding:
    """One kind of batch in one layout, compared with one process.

    Attributes:
        kind: of batch.
        loss: the largest relative difference of a step's loss on any rank.
        grad_norm: relative difference of the global gradient norm before clipping.
        gradient, weight: the largest relative error of a parameter's gradient, and of its clipped update, and whose.
        small: parameters under the floor.
        bounds: which of these errors are too large.
    """

    bounds: Bounds
    kind: str
    loss: float
    grad_norm: float
    gradient: float
    gradient_of: str
    weight: float
    weight_of: str
    small: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.loss <= self.bounds.loss and max(self.grad_norm, self.gradient, self.weight) <= self.bounds.tensor


@dataclass(frozen=True)
class LayoutResult:
    """All kinds of batch in one layout; `failure`: why it could not run."""

    layout: str
    world_size: int
    num_microbatches: int
    seconds: float
    findings: tuple[Finding, ...] = ()
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and all(finding.passed for finding in self.findings)

    @property
    def worst(self) -> Finding | None:
        """The finding with the largest error of a parameter, one that failed before all others."""
        return max(
            self.findings,
            key=lambda finding: (not finding.passed, max(finding.gradient, finding.weight)),
            default=None,
        )

    def row(self) -> tuple[str, ...]:
        """Layout, processes, loss, gradient norm, worst parameter, its error, batch, verdict."""
        if self.failure is not None or self.worst is None:
            reason = (self.failure or "no batch").strip().splitlines()[-1]
            return (self.layout, str(self.world_size), "", "", reason[:60], "", "", "FAIL")
        worst = self.worst
        error, name = max((worst.gradient, worst.gradient_of), (worst.weight, f"{worst.weight_of} (update)"))
        return (
            self.layout,
            str(self.world_size),
            f"{max(finding.loss for finding in self.findings):.0e}",
            f"{max(finding.grad_norm for finding in self.findings):.0e}",
            name,
            f"{error:.0e}",
            worst.kind,
            "pass" if self.passed else "FAIL",
        )


HEADINGS = ("layout", "processes", "loss", "norm", "worst parameter", "error", "batch", "")


def summary(results: Sequence[LayoutResult], bounds: Bounds) -> str:
    """One line: how many passed, and the bounds."""
    passed = sum(result.passed for result in results)
    return (
        f"{passed} of {len(results)} layouts equal one process. Bounds: loss {bounds.loss:g}; "
        f"gradient norm, gradient and update of every parameter {bounds.tensor:g}."
    )


def small_parameters(results: Sequence[LayoutResult]) -> dict[str, list[str]]:
    """Parameters under the floor, with the kinds of batch where they are."""
    kinds: dict[str, set[str]] = {}
    for result in results:
        for finding in result.findings:
            for name in finding.small:
                kinds.setdefault(name, set()).add(finding.kind)
    return {name: sorted(found) for name, found in sorted(kinds.items())}


def markdown(results: Sequence[LayoutResult], *, settings: Sequence[str], bounds: Bounds) -> str:
    """The whole report."""
    lines = [
        "# Parity of parallel layouts",
        "",
        *(f"- {setting}" for setting in settings),
        "",
        summary(results, bounds),
        "",
    ]
    lines += [_markdown_row(HEADINGS), _markdown_row(["---"] * len(HEADINGS))]
    lines += [_markdown_row(result.row()) for result in results]
    small = small_parameters(results)
    if small:
        lines += ["", "Gradients under the floor, compared with it instead of with themselves:", ""]
        lines += [f"- `{name}`: {', '.join(kinds)}" for name, kinds in small.items()]
    for result in results:
        if result.failure is not None:
            lines += ["", f"## {result.layout}", "", "```", result.failure.strip(), "```"]
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Sequence[LayoutResult], *, settings: Sequence[str], bounds: Bounds) -> None:
    """`parity.json` and `parity.md` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": list(settings),
        "passed": all(result.passed for result in results),
        "layouts": [asdict(result) | {"passed": result.passed} for result in results],
    }
    (folder / "parity.json").write_text(json.dumps(record, indent=1))
    (folder / "parity.md").write_text(markdown(results, settings=settings, bounds=bounds))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
