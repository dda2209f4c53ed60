"""Figures of a run against its steps."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from megatron_mm1.pages.pictures import svg
from megatron_mm1.report.log import Line

_COLOURS = ("#1f6feb", "#b35900", "#2da44e", "#8250df", "#bf3989", "#57606a", "#9a6700", "#0a7ea4")
_MANY = 8
"""Lines with a marker at every point where there are fewer points."""


def chart(lines: Mapping[str, Line], *, unit: str, dashed: Mapping[str, Line] | None = None) -> bytes:
    """SVG of lines over steps.

    Args:
        lines: by label.
        unit: of the vertical axis.
        dashed: more of them, each in the colour of the line with the same label.
    """
    figure = Figure(figsize=(4.8, 2.7), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (label, line), colour in zip(lines.items(), _cycled(len(lines)), strict=True):
        marker = "o" if len(line) < _MANY else ""
        axes.plot(list(line), list(line.values()), color=colour, label=label, marker=marker, markersize=3)
        other = (dashed or {}).get(label)
        if other:
            axes.plot(list(other), list(other.values()), color=colour, linestyle="--", marker=marker, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)  # sources have names of the user's own
    return svg(figure)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]
