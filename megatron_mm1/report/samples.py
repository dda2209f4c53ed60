"""What a run's evaluations asked and were answered, with the images."""

import html
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import ImageFile
from megatron_mm1.evaluation.results import ITEMS
from megatron_mm1.pages.pictures import thumbnail

_PER_TASK = 12


def evaluation_folders(run: Path) -> list[Path]:
    """Folders below the run that `mm1 eval` wrote to."""
    return sorted(file.parent for file in run.rglob(ITEMS))


def samples(folder: Path, *, page: Path) -> str:
    """HTML of the first items of each task, with the fewest demonstrations: their order is a fair sample.

    Args:
        page: where the report will be, which links to the evaluation's own.
    """
    parts = [f"<h2>Samples of {html.escape(folder.name)}</h2>"]
    if (folder / "report.html").exists():
        link = html.escape(os.path.relpath(folder / "report.html", page.parent))
        parts.append(f'<p class="note"><a href="{link}">All figures of this evaluation</a></p>')
    for task, rows in _by_task(folder / ITEMS).items():
        fewest = min(row.get("shots", 0) for row in rows)
        chosen = [row for row in rows if row.get("shots", 0) == fewest][:_PER_TASK]
        shots = f", {fewest} demonstrations" if fewest else ""
        parts.append(f'<p><b>{html.escape(task)}</b>{shots}</p><div class="samples">')
        parts += [_sample(row) for row in chosen]
        parts.append("</div>")
    return "\n".join(parts)


def _by_task(file: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Answered items; those with exchanged images are left to the evaluation's own report."""
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(file):
        if "refused" not in row and not row.get("images_exchanged"):
            tasks.setdefault(str(row.get("task", "")), []).append(row)
    return tasks


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    # An evaluation that is still running may have written half of its last line.
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}, is damaged: run `mm1 eval` again, or move its folder away")
        yield row


def _sample(row: Mapping[str, Any]) -> str:
    images, prompt = row.get("images", []), str(row.get("prompt", ""))
    question = prompt.rpartition("<image>")[2].strip()
    picture = _picture(images[-1]) if images else ""
    answer = str(row.get("output") or "").strip()
    measures = ", ".join(f"{name} {value:.3g}" for name, value in row.get("measures", {}).items())
    listed = [("truth", str(row.get("reference", "")))] + ([("model", answer)] if answer else [])
    items = "".join(f"<li>{label}: <b>{html.escape(text)}</b></li>" for label, text in listed)
    mark = _mark(row.get("measures", {}))
    return (
        f'<article class="{mark}"><div class="prompt query">{picture}{html.escape(question)}</div><ul>{items}</ul>'
        f'<p class="note">{html.escape(measures)}</p></article>'
    )


def _picture(place: str) -> str:
    try:
        return thumbnail(ImageFile.parse(place).read().data, title=place)
    except UserError:
        return f'<span class="note">[{html.escape(place)} is gone]</span> '


def _mark(measures: Mapping[str, float]) -> str:
    """By the first measure that is a share: "right", "wrong", or nothing where there is none."""
    shares = [value for name, value in measures.items() if "accuracy" in name or "match" in name]
    return "" if not shares else "right" if shares[0] >= 0.5 else "wrong"
