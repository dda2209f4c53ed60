"""What an evaluation task is; an extension point: a task is chosen by a name below or by the import path of a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_mm1.data.records import Image, Text
from megatron_mm1.extension import resolve
from megatron_mm1.inference.requests import Score


@dataclass(frozen=True)
class Item:
    """One thing to ask of a model.

    Attributes:
        key: names the item in the results.
        prompt: what text is generated behind.
        reference: the right answer.
        scored: (prompt, continuation) pairs whose likelihood is wanted.
        groups: figures are reported over all items and over each group.
        cluster: items of one cluster are not independent, so intervals resample them together; None: alone.
        weight: of the item in every mean.
    """

    key: str
    prompt: tuple[Text | Image, ...]
    reference: str
    scored: tuple[tuple[tuple[Text | Image, ...], str], ...] = ()
    groups: tuple[str, ...] = ()
    cluster: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What the model made of an item.

    Attributes:
        text: generated behind the prompt, without white space around it; empty where the task generates nothing.
        scores: of the item's `scored`, in order.
    """

    text: str
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Measure:
    """A measurement of one item, and its weight in the mean over items, which the item's own multiplies."""

    value: float
    weight: float = 1.0


class Task(Protocol):
    """An evaluation task; built without arguments, on every rank.

    Attributes:
        max_new_tokens: of generated text; 0: nothing is generated.
    """

    max_new_tokens: int

    def items(self) -> Sequence[Item]:
        """The items, the same on every rank, in an order of which any beginning is a fair sample.

        Raises:
            UserError: the data is missing.
        """
        ...

    def measure(self, item: Item, outcome: Outcome) -> Mapping[str, Measure]:
        """Measurements by name; means over items are reported, with confidence intervals."""
        ...


TASKS: Mapping[str, str] = {
    "demo_captions": "megatron_mm1.evaluation.demo_tasks.DemoCaptions",
    "demo_questions": "megatron_mm1.evaluation.demo_tasks.DemoQuestions",
}


def build_task(name: str) -> Task:
    """The task `name` stands for: built-in, or the import path of a class.

    Raises:
        UserError: there is no such task.
    """
    return resolve("evaluation task", name, TASKS)()


def prompt_text(prompt: Sequence[Text | Image]) -> str:
    """A prompt for reading, with images as "<image>"."""
    return "".join("<image>" if isinstance(part, Image) else part.text for part in prompt)
