"""One picture of what a model says about images, beside the truth."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_mm1.data.files import replace_file

_COLUMNS = 6
_PANEL_WIDTH, _PANEL_HEIGHT, _TITLE_HEIGHT = 2.25, 2.35, 0.45
"""Inches, at `_DPI`."""
_DPI = 100
_LINE_WIDTH = 32
"""Characters that fit under a panel."""
_RIGHT, _WRONG, _TRUTH = "#1a7f37", "#b35900", "#333333"


@dataclass(frozen=True)
class Panel:
    """An image and what is said about it.

    Attributes:
        image: encoded bytes.
        question: what was asked; empty for a caption.
        output, reference: the model's answer and the truth.
    """

    image: bytes
    question: str
    output: str
    reference: str


def write_contact_sheet(path: Path, sections: Sequence[tuple[str, Sequence[Panel]]]) -> None:
    """Draw titled rows of panels and write a PNG in one step.

    Answers equal to the truth are green, others orange.
    """
    rows = [-(-len(panels) // _COLUMNS) for _, panels in sections]
    height = sum(rows) * _PANEL_HEIGHT + len(sections) * _TITLE_HEIGHT
    figure = Figure(figsize=(_COLUMNS * _PANEL_WIDTH, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    top = height
    for (title, panels), num_rows in zip(sections, rows, strict=True):
        figure.text(0.01, (top - _TITLE_HEIGHT / 2) / height, title, fontsize=12, weight="bold", va="center")
        top -= _TITLE_HEIGHT
        for index, panel in enumerate(panels):
            row, column = divmod(index, _COLUMNS)
            _draw(figure, panel, left=column * _PANEL_WIDTH, top=top - row * _PANEL_HEIGHT, height=height)
        top -= num_rows * _PANEL_HEIGHT
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white")
    replace_file(path, content.getvalue())


def _draw(figure: Figure, panel: Panel, *, left: float, top: float, height: float) -> None:
    """One panel with its upper left corner at (`left`, `top`) inches: image above, text below."""
    width, side = _COLUMNS * _PANEL_WIDTH, 1.1
    axes = figure.add_axes(
        ((left + (_PANEL_WIDTH - side) / 2) / width, (top - side) / height, side / width, side / height)
    )
    axes.imshow(PIL.Image.open(io.BytesIO(panel.image)).convert("RGB"))
    axes.set_axis_off()
    line = top - side - 0.06
    is_right = panel.output == panel.reference
    for text, colour in (
        (panel.question, _TRUTH),
        (f"model: {panel.output}", _RIGHT if is_right else _WRONG),
        (f"truth: {panel.reference}", _TRUTH),
    ):
        for part in textwrap.wrap(text, _LINE_WIDTH, max_lines=3, placeholder=" .."):
            # parse_math: a "$" is a dollar.
            figure.text(
                (left + _PANEL_WIDTH / 2) / width,
                line / height,
                part,
                fontsize=8.3,
                color=colour,
                ha="center",
                va="top",
                parse_math=False,
            )
            line -= 0.14
