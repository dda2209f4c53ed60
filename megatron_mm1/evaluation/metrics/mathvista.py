"""MathVista (Lu et al. 2024): answers taken out of text by rules.

The benchmark's own code asks GPT-4 for the answer in what a model says; figures by rules are not the same as those.
"""

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.choice import chosen_letter
from megatron_mm1.evaluation.task import Measure, Measures
from megatron_mm1.evaluation.template import LETTERS

_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)")
_LIST = re.compile(r"\[[^\[\]]*\]")


def mathvista_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Whether the answer in a prediction is the item's, in the form that its kind of answer has.

    Items have the attributes `answer_type` (text, integer, float, list) and `precision` (decimals of a float).
    """
    return [
        {"accuracy": Measure(float(extract_answer(text, item) == item.truths[0]))}
        for item, text in zip(items, predictions, strict=True)
    ]


def extract_answer(text: str, item: Item) -> str | None:
    """The answer in `text`: a choice's text, or a number or list in its usual form; None where there is none."""
    if item.choices:
        return _choice(text.strip(), item.choices)
    kind = item.attributes["answer_type"]
    if kind == "list":
        found = _LIST.findall(text)
        return found[-1] if found else None
    if kind not in ("integer", "float"):
        return text.strip()
    numbers = [found for found in _NUMBER.findall(text) if found]
    if not numbers:
        return None
    value = float(numbers[-1].replace(",", ""))
    if math.isinf(value):  # hundreds of digits, from a model that repeats itself
        return None
    return str(int(value)) if kind == "integer" else str(round(value, int(item.attributes["precision"])))


def _choice(text: str, choices: Sequence[str]) -> str:
    """The choice named, or else the one whose text is nearest, as in the benchmark's code."""
    if text in choices:
        return text
    if letter := chosen_letter(text, choices):
        return choices[LETTERS.index(letter)]
    return min(choices, key=lambda choice: Levenshtein.distance(text, choice))
