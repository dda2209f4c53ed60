"""What an evaluation task is; an extension point: one is chosen by a built-in name or by the import path of a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Protocol

from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Item, Split
from megatron_mm1.evaluation.template import Stopping, Template
from megatron_mm1.extension import resolve
from megatron_mm1.inference.requests import Score


@dataclass(frozen=True)
class Outcome:
    """What the model made of an item.

    Attributes:
        text: its answer, as extracted from what it generated; empty where the task generates nothing.
        scores: of the item's candidates, in order.
        raw: what it generated, up to a stop string.
        finish_reason: why that ended: "end" of text, a "stop" string, or the "length" allowed; empty: see `text`.
    """

    text: str
    scores: tuple[Score, ...] = ()
    raw: str = ""
    finish_reason: str = ""


@dataclass(frozen=True)
class Refusal:
    """Stands in the place of an outcome: the item could not be asked. It counts in no figure.

    Attributes:
        message: what is wrong and what to do, in one line.
    """

    message: str


@dataclass(frozen=True)
class Measure:
    """A measurement of one item, and its weight in the mean over items, which the item's own multiplies."""

    value: float
    weight: float = 1.0


Measures = Mapping[str, Measure]
"""Of one item, by name."""


class Metric(Protocol):
    """Compares predictions with truths.

    A score is a mean of measures, weighted where need be (F1 is one), so that intervals can resample items.
    """

    def __call__(self, items: Sequence[Item], predictions: Sequence[str]) -> Sequence[Measures]:
        """The measures of each item; all items come at once, since some metrics compare an item with all others."""
        ...


class Task(Protocol):
    """An evaluation task; the same on every rank. `tasks.base.Benchmark` has most of it.

    Attributes:
        stopping: where generated text ends.
        headline: the measure that speaks for the task in plots; the higher, the better.
    """

    stopping: Stopping
    headline: str

    def items(self) -> Split:
        """The evaluation split.

        Raises:
            UserError: the data is missing or of another layout.
        """
        ...

    def demonstrations(self) -> Split:
        """What demonstrations are drawn from: the training split.

        Raises:
            UserError: as `items`; or the task has none.
        """
        ...

    def template(self, item: Item) -> Template:
        """How the item is written."""
        ...

    def measure(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Sequence[Measures]:
        """The measures of each item; means over items are reported, with confidence intervals."""
        ...


_TASKS = "megatron_mm1.evaluation.tasks"
TASKS: Mapping[str, str] = {
    "ai2d": f"{_TASKS}.ai2d.AI2D",
    "chartqa": f"{_TASKS}.chartqa.ChartQA",
    "coco": f"{_TASKS}.coco.CocoCaptions",
    "demo_captions": f"{_TASKS}.demo.DemoCaptions",
    "demo_questions": f"{_TASKS}.demo.DemoQuestions",
    "demo_questions_exchanged": f"{_TASKS}.demo.DemoQuestionsExchanged",
    "docvqa": f"{_TASKS}.docvqa.DocVQA",
    "mathvista": f"{_TASKS}.mathvista.MathVista",
    "mmmu": f"{_TASKS}.mmmu.MMMU",
    "nocaps": f"{_TASKS}.nocaps.NoCaps",
    "okvqa": f"{_TASKS}.okvqa.OKVQA",
    "pope": f"{_TASKS}.pope.POPE",
    "scienceqa_img": f"{_TASKS}.scienceqa.ScienceQAImages",
    "textcaps": f"{_TASKS}.textcaps.TextCaps",
    "textvqa": f"{_TASKS}.textvqa.TextVQA",
    "vizwiz": f"{_TASKS}.vizwiz.VizWiz",
    "vqav2": f"{_TASKS}.vqav2.VQAv2",
}


def build_task(name: str, folder: Path | None = None) -> Task:
    """The task `name` stands for: built-in, or the import path of a class.

    Args:
        folder: of its data; None: where the task knows itself.

    Raises:
        UserError: there is no such task, or it needs a folder, or takes none.
    """
    task_class = resolve("evaluation task", name, TASKS)
    arguments = () if folder is None else (folder,)
    try:
        signature(task_class).bind(*arguments)
    except TypeError:
        needs = "reads its data from a folder: say which" if folder is None else "takes no folder: leave it out"
        raise UserError(f"evaluation task {name!r} {needs}") from None
    return task_class(*arguments)
