"""Results as tables, for a console and as Markdown."""

from collections.abc import Sequence

from megatron_mm1.evaluation.published import PUBLISHED, beside_published
from megatron_mm1.evaluation.results import ALL, Result, by_task, control_of, differences
from megatron_mm1.evaluation.template import prompt_text

Table = list[list[str]]
"""Rows of cells; the first is the heading."""

_HEADING = ["task", "shots", "group", "measure", "mean [95 % interval]", "items", "lost by exchange of images"]


def headlines_table(results: Sequence[Result]) -> Table:
    """`figures_table` with the headline of each task over all items only."""
    heading, *rows = figures_table(results)
    headlines = {(one.task, ALL, one.headline) for one in results}
    return [heading, *(row for row in rows if (row[0], row[2], row[3]) in headlines)]


def figures_table(results: Sequence[Result]) -> Table:
    """Every figure of every result; controls stand in the last column, as what is lost in them."""
    with_control = any(one.is_control for one in results)
    rows = [_HEADING if with_control else _HEADING[:-1]]
    for result in results:
        if result.is_control:
            continue
        control = control_of(result, results)
        lost = differences(result, control) if control is not None else {}
        for group, named in result.figures.items():
            for name, interval in named.items():
                cells = [result.task, str(result.settings.shots), group, name, str(interval), str(interval.count)]
                told = str(lost[name]) if group == ALL and name in lost else ""
                rows.append([*cells, told] if with_control else cells)
    return rows


def published_tables(results: Sequence[Result], *, name: str) -> list[Table]:
    """A run's figures beside MM1's, one table for each number of shots that the paper reports."""
    tables = []
    own = [one for one in results if not one.is_control]
    for shots in sorted({one.settings.shots for one in own} & {one.shots for one in PUBLISHED}):
        measured = {one.task: one.figures[ALL] for one in own if one.settings.shots == shots}
        table = beside_published(measured, shots=shots, name=name)
        if len(table) > 1 and len(table[0]) > 3:  # some task of ours, and some model of theirs
            tables.append(table)
    return tables


def verdicts(results: Sequence[Result]) -> list[str]:
    """For each control, whether it shows that the model gets anything from its demonstrations' images."""
    lines = []
    for result in results:
        control = control_of(result, results)
        lost = differences(result, control).get(result.headline) if control is not None else None
        if lost is None:
            continue
        told = "the model uses them" if lost.low > 0 else "no use of them is shown"
        lines.append(
            f"{result.task}: exchanging the images of {result.settings.shots} demonstrations costs {lost} of "
            f"{result.headline} over {lost.count} items: {told}."
        )
    return lines


def counts_table(results: Sequence[Result]) -> Table:
    """How many items were answered, and how many not."""
    rows = [["task", "shots", "answered", "refused", "left out: unusable in the data"]]
    for result in results:
        shots = f"{result.settings.shots}, images exchanged" if result.is_control else str(result.settings.shots)
        left_out = ", ".join(f"{reason}: {count}" for reason, count in result.left_out.items())
        rows.append([result.task, shots, str(len(result.measured)), str(len(result.refused)), left_out or "none"])
    return rows


def refusals(results: Sequence[Result]) -> list[str]:
    """One line for each item that could not be asked or answered, without those of controls."""
    return [
        f"{one.task}, {one.settings.shots} shots, item {item.key}: {refusal.message}"
        for one in results
        if not one.is_control
        for item, refusal in one.refused
    ]


def samples(results: Sequence[Result], *, per_task: int = 6) -> str:
    """The first answers of each task beside the truth, for a console; empty where no task generates text."""
    blocks = []
    for task, of_task in by_task(results).items():
        shown = [one for one in of_task[0].measured if one.outcome.text][:per_task]
        if shown:
            blocks.append(f"{task}, held out:")
        for one in shown:
            prompt = prompt_text(one.request.prompt)
            blocks.append(f"  {prompt}\n      model: {one.outcome.text}\n      truth: {one.item.answer}")
    return "\n".join(blocks)


def console(table: Table) -> str:
    """Columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
