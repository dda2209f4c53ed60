"""The presets' sizes beside the paper's."""

from megatron_mm1.config.laws import PUBLISHED_SIZES
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.planning.parameters import count_parameters


def presets_table() -> str:
    """One line per preset: computed parameter counts and the published size."""
    rows: list[tuple[str, ...]] = [("preset", "decoder", "vision", "connector", "total", "active", "paper")]
    for name in PRESETS:
        counts = count_parameters(preset(name).model)
        numbers = (counts.non_embedding, counts.vision, counts.connector, counts.total, counts.active)
        size, what = PUBLISHED_SIZES.get(name, (None, ""))
        paper = "" if size is None else f"{human(size)} {what}"
        rows.append((name, *map(human, numbers), paper))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(
        [*lines, "", "decoder: without embedding and output layer; active: what one token passes through."]
    )


def human(number: float) -> str:
    """A count in at most four digits: 9.4M, 302M, 29.95B."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:.4g}"
