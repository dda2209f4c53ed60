"""The files an evaluation leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mm1.data.files import replace_file
from megatron_mm1.evaluation.contact_sheet import Panel, write_contact_sheet
from megatron_mm1.evaluation.page import page
from megatron_mm1.evaluation.published import SOURCE
from megatron_mm1.evaluation.results import MeasuredItem, Result, by_task, write_results
from megatron_mm1.evaluation.tables import (
    counts_table,
    figures_table,
    headlines_table,
    markdown,
    published_tables,
    refusals,
    verdicts,
)

CONTACT_SHEET, MARKDOWN, PAGE = "contact_sheet.png", "report.md", "report.html"
_PANELS_PER_TASK = 12


def write_report(
    output: Path, description: Mapping[str, Any], results: Sequence[Result], *, name: str, with_images: bool
) -> None:
    """Write items.jsonl, results.json, report.md, report.html and, where the model sees images and generates text about
    them, contact_sheet.png.

    Args:
        description: what was evaluated and how.
        name: of the model.
        with_images: the model sees images.
    """
    write_results(output, description, results)
    replace_file(output / MARKDOWN, _markdown(results, name=name).encode())
    replace_file(output / PAGE, page(description, results, name=name, with_images=with_images).encode())
    sections = _sections(results) if with_images else []
    if sections:
        write_contact_sheet(output / CONTACT_SHEET, sections)


def _markdown(results: Sequence[Result], *, name: str) -> str:
    parts = [f"# Evaluation of {name}", markdown(headlines_table(results))]
    parts += verdicts(results)
    published = published_tables(results, name=name)
    if published:
        parts += ["## Beside MM1", SOURCE, *map(markdown, published)]
    parts += ["## All figures", markdown(figures_table(results)), "## Items", markdown(counts_table(results))]
    lines = refusals(results)
    if lines:
        parts += ["## Not asked, or not answered", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _sections(results: Sequence[Result]) -> list[tuple[str, list[Panel]]]:
    """The first items of each task, with the fewest shots, that show an image and got an answer: their order is a fair
    sample.
    """
    sections = []
    for task, of_task in by_task(results).items():
        answered = [one for one in of_task[0].measured if one.outcome.text and one.item.images]
        panels = [_panel(one) for one in answered[:_PANELS_PER_TASK]]
        if panels:
            sections.append((f"{task} (green: as the truth has it)", panels))
    return sections


def _panel(one: MeasuredItem) -> Panel:
    image = one.item.images[0].read().data
    return Panel(image=image, question=one.item.question, output=one.outcome.text, reference=one.item.answer)
