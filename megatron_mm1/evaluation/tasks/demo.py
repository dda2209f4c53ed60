"""Tasks on the held-out part of the demo corpus."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm1.data.demo import DEMO_CORPUS
from megatron_mm1.data.readers import Captions, JsonLinesReader, Questions
from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.data.records import Rejected
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Candidate, ImageFile, Item, Split
from megatron_mm1.evaluation.metrics.strings import exact_match
from megatron_mm1.evaluation.task import Measure, Measures, Outcome
from megatron_mm1.evaluation.tasks.files import ImageFolder
from megatron_mm1.evaluation.template import QUESTION, Stopping, Template

_SEED = 0
SHAPES = frozenset(("circle", "rectangle", "triangle"))
_BARE = Template(question="", cue="", answer="{answer}")
"""A caption right behind its image, as it is trained."""


class DemoCaptions:
    """Captions of held-out images: "heldstyle" (the concept was trained in another drawing style) and "unseen".

    loss_true_image     nats per token of the true caption
    loss_other_image    the same behind the image of another concept
    loss_gain           the difference: what looking at the right image is worth
    choice_accuracy     of ten captions the true one gains most by the right image (nats); chance is 0.1, a tie is wrong
    exact_match         the generated caption is the true one

    Every concept weighs the same, in however many skin tones and styles it is drawn. The choice goes by what a caption
    gains and not by its likelihood alone, which says first of all how common its words are (Holtzman et al. 2021).
    """

    stopping = Stopping(max_new_tokens=24)
    headline = "choice_accuracy"
    num_distractors = 9

    def __init__(self, corpus: Path = DEMO_CORPUS) -> None:
        self.path = corpus / "raw" / "captions"

    def items(self) -> Split:
        rows = _shuffled(Captions, self.path / "validation")
        captions = np.array(sorted({row["caption"] for _, row, _ in rows}))
        drawings = Counter(row["concept"] for _, row, _ in rows)
        generator = np.random.default_rng(_SEED)
        items = []
        for index, (_, row, image) in enumerate(rows):
            drawn = generator.choice(captions, self.num_distractors + 1, replace=False)
            distractors = [str(other) for other in drawn if other != row["caption"]][: self.num_distractors]
            following = rows[index + 1 :] + rows[:index]
            other = next(image for _, other, image in following if _differ(row, other))
            texts = [row["caption"], *distractors]
            shown = (None, (other,))
            items.append(
                Item(
                    key=row["image"],
                    images=(image,),
                    answer=row["caption"],
                    candidates=tuple(Candidate(text, images) for text in texts for images in shown),
                    groups=(row["kind"],),
                    cluster=row["concept"],
                    weight=1 / drawings[row["concept"]],
                )
            )
        return Split(tuple(items))

    def demonstrations(self) -> Split:
        rows = _rows(Captions, self.path / "train")
        return Split.of(
            (Item(key=key, images=(image,), answer=row["caption"], cluster=row["concept"]) for key, row, image in rows),
            source=str(self.path / "train"),
        )

    def template(self, item: Item) -> Template:
        return _BARE

    def measure(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Sequence[Measures]:
        matches = exact_match(items, [outcome.text for outcome in outcomes])
        return [{**_choice(outcome), **match} for outcome, match in zip(outcomes, matches, strict=True)]


class DemoQuestions:
    """Questions about held-out images of coloured shapes (easy-vqa's test split); accuracy of the generated answer.

    2,000 questions of its 9,673, drawn once.
    """

    stopping = Stopping(max_new_tokens=8)
    headline = "accuracy"
    num_questions = 2000

    def __init__(self, corpus: Path = DEMO_CORPUS) -> None:
        self.path = corpus / "raw" / "questions"

    def items(self) -> Split:
        rows = _shuffled(Questions, self.path / "validation")[: self.num_questions]
        return Split(tuple(_question(*row) for row in rows))

    def demonstrations(self) -> Split:
        rows = _rows(Questions, self.path / "train")
        return Split.of((_question(*row) for row in rows), source=str(self.path / "train"))

    def template(self, item: Item) -> Template:
        return QUESTION

    def measure(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Sequence[Measures]:
        matches = exact_match(items, [outcome.text for outcome in outcomes])
        return [{"accuracy": match["exact_match"]} for match in matches]


class DemoQuestionsExchanged(DemoQuestions):
    """The same questions, each about the image of another one: what is right then was not seen.

    Answers are those that are true of a question's own image.
    """

    def items(self) -> Split:
        items = super().items().items
        images = list(dict.fromkeys(item.images for item in items))
        following = dict(zip(images, [*images[1:], *images[:1]], strict=True))
        return Split(tuple(replace(item, images=following[item.images]) for item in items))


def question_type(answer: str) -> str:
    """ "yes-no", "shape" or "colour", by what is answered."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in SHAPES else "colour"


def _choice(outcome: Outcome) -> Measures:
    """Measures of the true caption, whose two scores come first, and of its distractors."""
    true, other = outcome.scores[:2]
    pairs = zip(outcome.scores[::2], outcome.scores[1::2], strict=True)
    gain, *gains = [right.log_likelihood - wrong.log_likelihood for right, wrong in pairs]
    return {
        "loss_true_image": Measure(true.loss),
        "loss_other_image": Measure(other.loss),
        "loss_gain": Measure(other.loss - true.loss),
        "choice_accuracy": Measure(float(all(gain > distractor for distractor in gains))),
    }


def _question(key: str, row: dict[str, Any], image: ImageFile) -> Item:
    kind = question_type(row["answer"])
    return Item(
        key=key,
        images=(image,),
        question=row["question"],
        answer=row["answer"],
        groups=(kind,) if kind == "yes-no" else (kind, "shape or colour"),
        cluster=str(image.path),
    )


def _differ(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return row["concept"] != other["concept"] and row["caption"] != other["caption"]


def _shuffled(reader_class: type[JsonLinesReader], path: Path) -> list[tuple[str, dict[str, Any], ImageFile]]:
    """`_rows` in an order drawn once."""
    rows = _rows(reader_class, path)
    return [rows[index] for index in np.random.default_rng(_SEED).permutation(len(rows))]


def _rows(reader_class: type[JsonLinesReader], path: Path) -> list[tuple[str, dict[str, Any], ImageFile]]:
    """(key, row, image) of every row."""
    if not path.is_dir():
        raise UserError(f"no demo corpus at {path}: build it with `mm1 data demo`")
    reader, images = reader_class(path), ImageFolder(path)
    rows = []
    for shard in reader.shards():
        for row in reader.rows(shard):
            try:
                if isinstance(row, Rejected):
                    raise RejectRecord(row.reason, row.detail)
                rows.append((row.key, row.value, images.find(text_field(row.value, "image"))))
            except RejectRecord as error:
                raise UserError(
                    f"the demo corpus is damaged: {row.key}: {error}; build it again with `mm1 data demo`"
                ) from None
    return rows
