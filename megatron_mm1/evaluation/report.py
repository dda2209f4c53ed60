"""Results of an evaluation: figures with intervals, as JSON and as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mm1.data.files import replace_file
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.bootstrap import Interval, mean_interval
from megatron_mm1.evaluation.items import Item, Prompt
from megatron_mm1.evaluation.task import Measures, Outcome
from megatron_mm1.evaluation.template import prompt_text

ALL = "all"
RESULTS, ITEMS = "results.json", "items.jsonl"

Figures = Mapping[str, Mapping[str, Interval]]
"""Measure by measure for each group of items, `ALL` first."""


@dataclass(frozen=True)
class MeasuredItem:
    """An item, how it was asked, what the model made of it and what that is worth."""

    item: Item
    prompt: Prompt
    outcome: Outcome
    measures: Measures

    def as_row(self, task: str) -> dict[str, Any]:
        """The item's line of items.jsonl."""
        return {
            "task": task,
            "key": self.item.key,
            "groups": self.item.groups,
            "prompt": prompt_text(self.prompt),
            "raw_output": self.outcome.raw,
            "output": self.outcome.text,
            "reference": self.item.answer,
            "references": self.item.references,
            "scores": [
                {"continuation": candidate.text, **asdict(score)}
                for candidate, score in zip(self.item.candidates, self.outcome.scores, strict=True)
            ],
            "measures": {name: measure.value for name, measure in self.measures.items()},
        }


def figures(measured: Sequence[MeasuredItem]) -> Figures:
    """Means over all items and over each group, with intervals."""
    groups = sorted({group for one in measured for group in one.item.groups})
    members = {ALL: measured} | {group: [one for one in measured if group in one.item.groups] for group in groups}
    return {group: _intervals(items) for group, items in members.items()}


def _intervals(measured: Sequence[MeasuredItem]) -> dict[str, Interval]:
    intervals = {}
    for name in dict.fromkeys(name for one in measured for name in one.measures):
        having = [one for one in measured if name in one.measures]
        intervals[name] = mean_interval(
            [one.measures[name].value for one in having],
            weights=[one.item.weight * one.measures[name].weight for one in having],
            # Alone in its cluster where it names none; a pair never equals a name.
            clusters=[one.item.cluster or ("item", index) for index, one in enumerate(having)],
        )
    return intervals


def write_results(
    output: Path, description: Mapping[str, Any], tasks: Mapping[str, Sequence[MeasuredItem]]
) -> dict[str, Figures]:
    """Write items.jsonl, then results.json, each in one step.

    Args:
        description: what was evaluated and how; goes before the figures.

    Returns:
        Figures by task.
    """
    lines = [json.dumps(one.as_row(task), ensure_ascii=False) for task, items in tasks.items() for one in items]
    replace_file(output / ITEMS, "".join(line + "\n" for line in lines).encode())
    by_task = {task: figures(items) for task, items in tasks.items()}
    content = {**description, "tasks": {task: _plain(by_group) for task, by_group in by_task.items()}}
    replace_file(output / RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    return by_task


def _plain(by_group: Figures) -> dict[str, dict[str, dict[str, float]]]:
    return {group: {name: asdict(one) for name, one in named.items()} for group, named in by_group.items()}


def read_figures(output: Path) -> dict[str, Figures]:
    """Figures by task out of the results.json in `output`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = output / RESULTS
    try:
        tasks = json.loads(file.read_text())["tasks"]
        return {
            task: {
                group: {name: Interval(**fields) for name, fields in named.items()} for group, named in by_group.items()
            }
            for task, by_group in tasks.items()
        }
    except FileNotFoundError:
        raise UserError(f"no evaluation in {output}: run `mm1 eval --output {output} ..`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: run `mm1 eval` again") from error


def samples(output: Path, *, per_task: int = 6) -> str:
    """The first answers of each task beside the truth, for a console; empty where no task generates text."""
    shown: dict[str, list[str]] = {}
    for line in (output / ITEMS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        lines = shown.setdefault(row["task"], [])
        if row["output"] and len(lines) < per_task:
            lines.append(f"  {row['prompt']}\n      model: {row['output']}\n      truth: {row['reference']}")
    return "\n".join("\n".join([f"{task}, held out:", *lines]) for task, lines in shown.items() if lines)


def table(tasks: Mapping[str, Figures]) -> str:
    """The figures for a console: mean and interval of each measure by group."""
    lines = [f"{'task':<16}{'group':<18}{'measure':<18}{'mean [95 % interval]':<26}{'items':>7}"]
    for task, by_group in tasks.items():
        for group, named in by_group.items():
            for name, interval in named.items():
                lines.append(f"{task:<16}{group:<18}{name:<18}{interval!s:<26}{interval.count:>7}")
    return "\n".join(lines)
