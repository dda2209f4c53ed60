"""Multiple choice: which letter does an answer name?"""

import re
from collections.abc import Sequence

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.task import Measure, Measures
from megatron_mm1.evaluation.template import LETTERS


def choice_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Whether the prediction names the letter that is the item's answer; one that names none is wrong.

    (MMMU's own code guesses there, at random.)
    """
    return [
        {"accuracy": Measure(float(chosen_letter(text, item.choices) == item.answer))}
        for item, text in zip(items, predictions, strict=True)
    ]


def chosen_letter(text: str, choices: Sequence[str]) -> str:
    """The letter of the choice that `text` names; empty where it names none.

    In this order: the text is a letter, or begins with one as a list does ("B. a dog", "B) a dog"); the last letter in
    brackets; the last letter on its own, where it is no article or pronoun ("A dog", "I see"); the text is a choice;
    the text contains one choice only.
    """
    text, letter = text.strip(), f"[{LETTERS[: len(choices)]}]"
    if found := re.match(rf"({letter})(?:$|[).:,])", text):
        return found[1]
    for pattern in (rf"\(({letter})\)", rf"(?<![\w'])({letter})(?![\w']| +[a-z])"):
        if named := re.findall(pattern, text):
            return named[-1]
    plain = text.rstrip(".").lower()
    spelled = [choice.rstrip(".").lower() for choice in choices]
    if plain in spelled:
        return LETTERS[spelled.index(plain)]
    contained = [index for index, choice in enumerate(spelled) if _holds(plain, choice)]
    return LETTERS[contained[0]] if len(contained) == 1 else ""


def _holds(text: str, choice: str) -> bool:
    return bool(choice) and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text) is not None
