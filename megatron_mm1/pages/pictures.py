"""Plots and images as text that a page holds."""

import base64
import html
import io

import matplotlib
import PIL.Image
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_SHOWN_SIDE = 128
"""px; images on a page are no larger."""


def svg(figure: Figure) -> bytes:
    """The same figure makes the same bytes; text stays text."""
    content = io.BytesIO()
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": "mm1", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def plot(content: bytes, *, alt: str) -> str:
    """An `img` element of an SVG."""
    data = base64.b64encode(content).decode()
    return f'<img class="plot" alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def thumbnail(content: bytes, *, title: str) -> str:
    """An `img` element of an encoded image, made small."""
    with PIL.Image.open(io.BytesIO(content)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=85)
    source = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="" title="{html.escape(title)}" src="data:image/jpeg;base64,{source}">'
