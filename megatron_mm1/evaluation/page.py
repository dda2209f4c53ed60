"""The report of an evaluation as one HTML file, which needs nothing else to be shown."""

import html
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from megatron_mm1.evaluation.items import ImageFile, Prompt
from megatron_mm1.evaluation.plot import shots_plot
from megatron_mm1.evaluation.published import SOURCE
from megatron_mm1.evaluation.results import MeasuredItem, Result, by_task
from megatron_mm1.evaluation.tables import (
    counts_table,
    figures_table,
    headlines_table,
    published_tables,
    refusals,
    verdicts,
)
from megatron_mm1.pages.pictures import plot, thumbnail
from megatron_mm1.pages.style import document, table

_FAILURES, _SUCCESSES = 8, 4
"""Samples of a task: so many with the lowest scores, then so many with the highest."""
_SHOWN_REFUSALS = 50


def page(description: Mapping[str, Any], results: Sequence[Result], *, name: str, with_images: bool = True) -> str:
    """HTML of results.

    Args:
        description: what was evaluated and how.
        name: of the model.
        with_images: the model sees images.
    """
    picture = cache(_picture) if with_images else _no_picture
    tables = [table(headlines_table(results))]
    published = published_tables(results, name=name)
    if published:
        tables.append(f'<h2>Beside MM1</h2><p class="note">{html.escape(SOURCE)}</p>')
        tables += [table(one) for one in published]
    body = [
        *tables,
        *(_task(task, of_task, picture) for task, of_task in by_task(results).items()),
        f"<details><summary>All figures</summary>\n{table(figures_table(results))}\n</details>",
        "<h2>Items</h2>",
        table(counts_table(results)),
        _refusals(results),
    ]
    return document("\n".join(body), title=f"Evaluation of {name}", description=_told(description))


def _told(description: Mapping[str, Any]) -> str:
    facts = {**description["checkpoint"], **description["few_shot"], "limit": description["limit"]}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None)


def _task(task: str, results: Sequence[Result], picture: Any) -> str:
    own = [one for one in results if not one.is_control]
    most = own[-1]
    parts = [f"<h2>{html.escape(task)}</h2>"]
    if most.values():
        parts.append(plot(shots_plot(results), alt="score against shots"))
    parts += [f"<p>{html.escape(line)}</p>" for line in verdicts(results)]
    note = f"Items with {most.settings.shots} shots, those with the lowest {most.headline} first."
    samples = "".join(_sample(one, most, results, picture) for one in chosen_samples(most))
    return "\n".join([*parts, f'<p class="note">{html.escape(note)}</p><div class="samples">{samples}</div>'])


def chosen_samples(result: Result) -> list[MeasuredItem]:
    """Items to show, failures first: the order of items is a fair sample, so the first of equals are one."""
    values = result.values()
    ranked = sorted(result.measured, key=lambda one: values.get(one.item.key, 0.0))
    best = sorted(ranked[_FAILURES:], key=lambda one: -values.get(one.item.key, 0.0))[:_SUCCESSES]
    return ranked[:_FAILURES] + best


def _sample(one: MeasuredItem, result: Result, results: Sequence[Result], picture: Any) -> str:
    value = result.values().get(one.item.key, 0.0)
    before, query = _split(one)
    shown = [f'<div class="prompt">{_prompt(before, picture)}</div>'] if before else []
    shown.append(f'<div class="prompt query">{_prompt(query, picture)}</div>')
    answers = "".join(_answer(one.item.key, other) for other in results)
    truth = " / ".join(dict.fromkeys(one.item.truths))
    key = f'<p class="note">{html.escape(one.item.key)}: {html.escape(result.headline)} {value:.3g}</p>'
    listed = f"<ul><li>truth: <b>{html.escape(truth)}</b></li>{answers}</ul>"
    return f'<article class="{_mark(value)}">{key}{"".join(shown)}{listed}</article>'


def _split(one: MeasuredItem) -> tuple[Prompt, Prompt]:
    """Demonstrations and query: the last images of a prompt are the item's own."""
    prompt, count = one.request.prompt, len(one.item.images)
    places = [index for index, part in enumerate(prompt) if isinstance(part, ImageFile)]
    start = places[-count] if count and len(places) > count else 0
    return prompt[:start], prompt[start:]


def _answer(key: str, result: Result) -> str:
    """What came of an item in another way of asking."""
    found = next((one for one in result.measured if one.item.key == key), None)
    way = f"{result.settings.shots} shots" + (", images exchanged" if result.is_control else "")
    if found is None:
        return f"<li>{way}: not answered</li>"
    value = result.values().get(key, 0.0)
    told = f"“{html.escape(found.outcome.raw.strip())}”" if found.outcome.raw else f"{result.headline} {value:.3g}"
    return f'<li class="{_mark(value)}">{way}: <b>{told}</b></li>'


def _mark(value: float) -> str:
    return "right" if value >= 0.5 else "wrong"


def _prompt(prompt: Prompt, picture: Any) -> str:
    return "".join(picture(part) if isinstance(part, ImageFile) else html.escape(part.text) for part in prompt)


def _picture(image: ImageFile) -> str:
    return thumbnail(image.read().data, title=str(image))


def _no_picture(image: ImageFile) -> str:
    return "&lt;image&gt;"


def _refusals(results: Sequence[Result]) -> str:
    lines = refusals(results)
    if not lines:
        return ""
    more = f"<p>.. and {len(lines) - _SHOWN_REFUSALS} more in items.jsonl</p>" if len(lines) > _SHOWN_REFUSALS else ""
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:_SHOWN_REFUSALS])
    return f"<h2>Not asked, or not answered</h2><p class=note>They count in no figure.</p><ul>{listed}</ul>{more}"
