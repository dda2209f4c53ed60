"""VQA accuracy (Antol et al. 2015): agreement with ten people, of whom each is left out once."""

import re
from collections.abc import Sequence

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.task import Measure, Measures

_AGREEING = 3
"""People who must have given an answer for it to be fully right."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_GROUPS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
"""The official code passes a flag where `re.sub` takes a count, so it removes this many."""
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Words that lack one apostrophe, and one that has it taken away, as in the official code."""


def vqa_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Two accuracies, in [0, 1], against each item's `references` (ten answers).

    accuracy            prediction and answers are always normalized, as OpenFlamingo does
    official_accuracy   only where people disagree, as the official code does
    """
    return [
        {
            "accuracy": Measure(answer_accuracy(prediction, item.truths)),
            "official_accuracy": Measure(official_answer_accuracy(prediction, item.truths)),
        }
        for item, prediction in zip(items, predictions, strict=True)
    ]


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement of normalized texts."""
    return _agreement(normalized(prediction), [normalized(answer) for answer in answers])


def official_answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement as the official code has it: texts are normalized only where the answers are not all the same."""
    answers = [_on_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        return answer_accuracy(prediction, answers)
    return _agreement(_on_one_line(prediction), answers)


def normalized(answer: str) -> str:
    """An answer in the official form: lower case, without punctuation and articles, numbers in digits.

    Example: "The two, T-shirts." -> "2 t shirts".
    """
    words = _without_punctuation(_on_one_line(answer)).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _agreement(prediction: str, answers: Sequence[str]) -> float:
    """The mean over people of min(1, others who gave the prediction / 3)."""
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / _AGREEING) for match in matches) / len(matches)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Marks at the edge of a word go, those inside become spaces; all go where a number has its thousands apart."""
    has_groups = _DIGIT_GROUPS.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_an_edge or has_groups else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)
