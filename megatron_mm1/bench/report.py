"""What `mm1 bench step` found: as a table and in JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_mm1.bench.clock import PARTS

FILE = "bench.json"


@dataclass(frozen=True)
class RankTimes:
    """Seconds of steps on one rank.

    Attributes:
        steps: of each step as in training.
        data_wait: of it waiting for data, mean.
        apart: of an instrumented step, mean.
        parts: mean seconds of an instrumented step by part, which add up to `apart`.
    """

    steps: tuple[float, ...]
    data_wait: float
    apart: float
    parts: dict[str, float]


@dataclass(frozen=True)
class StepReport:
    """Speed of a training step.

    Attributes:
        settings: of what was measured, and where.
        ranks: what each measured.
        positions, images: of a step, all ranks together; padding counts as positions.
        flops_per_device: of a step.
    """

    settings: dict[str, Any]
    ranks: tuple[RankTimes, ...]
    positions: int
    images: float
    flops_per_device: float

    @property
    def seconds(self) -> float:
        """Median over the steps as in training, of each the slowest rank's."""
        return median(max(of_step) for of_step in zip(*(rank.steps for rank in self.ranks), strict=True))

    def record(self) -> dict[str, Any]:
        """For JSON; times in seconds per step."""
        apart = [rank.apart for rank in self.ranks]
        return {
            "settings": self.settings,
            "step": {
                "seconds": self.seconds,
                "tokens_per_second": self.positions / self.seconds,
                "images": self.images,
                "images_per_second": self.images / self.seconds,
                "tflops_per_device": self.flops_per_device / self.seconds / 1e12,
                "data_wait": max(rank.data_wait for rank in self.ranks),
            },
            "instrumented": {
                "seconds": {"mean": fmean(apart), "max": max(apart)},
                "parts": {
                    part: {
                        "mean": fmean(rank.parts[part] for rank in self.ranks),
                        "max": max(rank.parts[part] for rank in self.ranks),
                        "by_rank": [rank.parts[part] for rank in self.ranks],
                    }
                    for part in PARTS
                },
            },
        }

    def table(self) -> str:
        """For people; times in milliseconds."""
        record = self.record()
        step, apart = record["step"], record["instrumented"]
        seconds, wait = 1000 * step["seconds"], 1000 * step["data_wait"]
        lines = [
            f"step {seconds:,.1f} ms (median), {wait:,.1f} ms of it waiting for data",
            f"{step['tokens_per_second']:,.0f} tokens/s, {step['images_per_second']:,.1f} images/s, "
            f"{step['tflops_per_device']:.3g} model TFLOP/s per device",
            "",
            "instrumented, nothing overlaps (ms)",
            f"{'part':<16}{'mean rank':>12}{'worst rank':>12}{'share':>8}",
        ]
        whole = apart["seconds"]
        for name, times in [*apart["parts"].items(), ("step", whole)]:
            share = times["mean"] / whole["mean"]
            lines.append(f"{name:<16}{1000 * times['mean']:>12,.1f}{1000 * times['max']:>12,.1f}{share:>8.1%}")
        return "\n".join(lines)


def write_report(report: StepReport, folder: Path) -> Path:
    """Write the record into `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    file.write_text(json.dumps(report.record(), indent=1) + "\n")
    return file
