"""What an evaluation came to: figures with intervals, what could not be asked, and every item; as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mm1.data.files import replace_file
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.bootstrap import Interval, difference_interval, mean_interval
from megatron_mm1.evaluation.fewshot import FewShot, Request
from megatron_mm1.evaluation.items import ImageFile, Item
from megatron_mm1.evaluation.plan import Condition
from megatron_mm1.evaluation.task import Measures, Outcome, Refusal
from megatron_mm1.evaluation.template import prompt_text

ALL = "all"
RESULTS, ITEMS = "results.json", "items.jsonl"

Figures = Mapping[str, Mapping[str, Interval]]
"""Measure by measure for each group of items, `ALL` first."""


@dataclass(frozen=True)
class MeasuredItem:
    """An item, how it was asked, what the model made of it and what that is worth."""

    item: Item
    request: Request
    outcome: Outcome
    measures: Measures


@dataclass(frozen=True)
class Result:
    """What a task came to in one way of presenting its items.

    Attributes:
        task: its name.
        headline: its measure for plots.
        measured: the items that were asked.
        refused: those that could not be.
    """

    task: str
    headline: str
    settings: FewShot
    left_out: Mapping[str, int]
    measured: tuple[MeasuredItem, ...]
    refused: tuple[tuple[Item, Refusal], ...] = ()

    @property
    def is_control(self) -> bool:
        return self.settings.permute_images

    @cached_property
    def figures(self) -> Figures:
        """Means over all items and over each group, with intervals: seconds of work for many items, so done once."""
        return figures(self.measured)

    def values(self) -> dict[str, float]:
        """The headline of each item that has it, by key."""
        return {
            one.item.key: one.measures[self.headline].value for one in self.measured if self.headline in one.measures
        }


def measure(condition: Condition, outcomes: Sequence[Outcome | Refusal]) -> Result:
    """The result of a condition.

    Raises:
        UserError: not one item was answered.
    """
    answered, refused = [], []
    for (item, request), outcome in zip(condition.asked, outcomes, strict=True):
        if isinstance(outcome, Outcome) and isinstance(request, Request):
            answered.append((item, request, outcome))
        elif isinstance(outcome, Refusal):
            refused.append((item, outcome))
    if not answered:
        raise UserError(f"{condition.label}: none of {len(refused)} items can be answered: {refused[0][1].message}")
    measures = condition.task.measure([item for item, _, _ in answered], [outcome for _, _, outcome in answered])
    measured = tuple(MeasuredItem(*one, of_item) for one, of_item in zip(answered, measures, strict=True))
    return Result(
        task=condition.name,
        headline=condition.task.headline,
        settings=condition.settings,
        left_out=condition.left_out,
        measured=measured,
        refused=tuple(refused),
    )


def figures(measured: Sequence[MeasuredItem]) -> Figures:
    """Means over all items and over each group, with intervals."""
    groups = sorted({group for one in measured for group in one.item.groups})
    members = {ALL: measured} | {group: [one for one in measured if group in one.item.groups] for group in groups}
    return {group: overall(items) for group, items in members.items()}


def overall(measured: Sequence[MeasuredItem]) -> dict[str, Interval]:
    """The mean of each measure over all items that have it."""
    intervals = {}
    for name in dict.fromkeys(name for one in measured for name in one.measures):
        having = [one for one in measured if name in one.measures]
        intervals[name] = mean_interval(
            [one.measures[name].value for one in having], weights=_weights(having, name), clusters=_clusters(having)
        )
    return intervals


def differences(own: Result, control: Result) -> dict[str, Interval]:
    """What each measure loses, over all items that both have, when the demonstrations' images are exchanged."""
    others = {one.item.key: one for one in control.measured}
    pairs = [(one, others[one.item.key]) for one in own.measured if one.item.key in others]
    intervals = {}
    for name in dict.fromkeys(name for one, _ in pairs for name in one.measures):
        having = [(one, other) for one, other in pairs if name in one.measures and name in other.measures]
        mine, theirs = ([pair[side] for pair in having] for side in (0, 1))
        if mine:
            intervals[name] = difference_interval(
                [one.measures[name].value for one in mine],
                [one.measures[name].value for one in theirs],
                weights=_weights(mine, name),
                other_weights=_weights(theirs, name),
                clusters=_clusters(mine),
            )
    return intervals


def _weights(measured: Sequence[MeasuredItem], name: str) -> list[float]:
    return [one.item.weight * one.measures[name].weight for one in measured]


def _clusters(measured: Sequence[MeasuredItem]) -> list[Any]:
    """Of each item; alone in its cluster where it names none, since a pair never equals a name."""
    return [one.item.cluster or ("item", index) for index, one in enumerate(measured)]


def by_task(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each task, in their order."""
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return tasks


def control_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The control of a result among `results`."""
    return next(
        (
            one
            for one in results
            if one.is_control
            and not result.is_control
            and one.task == result.task
            and one.settings.shots == result.settings.shots
        ),
        None,
    )


def write_results(output: Path, description: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write items.jsonl, then results.json, each in one step.

    Args:
        description: what was evaluated and how; goes before the figures.
    """
    rows = [row for result in results for row in _rows(result)]
    replace_file(output / ITEMS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    tasks = {task: _task_summary(of_task) for task, of_task in by_task(results).items()}
    content = {**description, "tasks": tasks}
    replace_file(output / RESULTS, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _task_summary(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "headline": results[0].headline,
        "left_out": dict(results[0].left_out),
        "shots": {str(one.settings.shots): _summary(one, results) for one in results if not one.is_control},
    }


def _summary(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    summary = {
        "answered": len(result.measured),
        "refused": len(result.refused),
        "figures": {group: _plain(named) for group, named in result.figures.items()},
    }
    control = control_of(result, results)
    if control is not None:
        summary["images_exchanged"] = _summary(control, ())
        summary["lost_by_exchange"] = _plain(differences(result, control))
    return summary


def _plain(named: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: asdict(one) for name, one in named.items()}


def _rows(result: Result) -> list[dict[str, Any]]:
    """The lines of items.jsonl."""
    way = {"task": result.task, "shots": result.settings.shots, "images_exchanged": result.is_control}
    answered = [way | _answered_row(one) for one in result.measured]
    return answered + [way | {"key": item.key, "refused": refusal.message} for item, refusal in result.refused]


def _answered_row(one: MeasuredItem) -> dict[str, Any]:
    return {
        "key": one.item.key,
        "groups": one.item.groups,
        "demonstrations": one.request.demonstrations,
        "prompt": prompt_text(one.request.prompt),
        "images": [str(part) for part in one.request.prompt if isinstance(part, ImageFile)],
        "raw_output": one.outcome.raw,
        "finish_reason": one.outcome.finish_reason,
        "output": one.outcome.text,
        "reference": one.item.answer,
        "references": one.item.references,
        "scores": [
            {"continuation": text, "log_likelihood": score.log_likelihood, "num_tokens": score.num_tokens}
            for (_, text), score in zip(one.request.scored, one.outcome.scores, strict=True)
        ],
        "measures": {name: measure.value for name, measure in one.measures.items()},
    }


def read_figures(output: Path, *, shots: int = 0) -> dict[str, Figures]:
    """Figures by task out of the results.json in `output`, of the tasks that were asked with so many shots.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = output / RESULTS
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        return {
            task: {
                group: {name: Interval(**fields) for name, fields in named.items()}
                for group, named in summary["shots"][str(shots)]["figures"].items()
            }
            for task, summary in tasks.items()
            if str(shots) in summary["shots"]
        }
    except FileNotFoundError:
        raise UserError(f"no evaluation in {output}: run `mm1 eval --output {output} ..`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: run `mm1 eval` again") from error
