"""Tasks on the held-out part of the demo corpus."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm1.data.demo import DEMO_CORPUS
from megatron_mm1.data.readers import Captions, JsonLinesReader, Questions, question_prompt
from megatron_mm1.data.records import Document, Image, Rejected, Text
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.task import Item, Measure, Outcome

_SEED = 0
SHAPES = frozenset(("circle", "rectangle", "triangle"))


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

    max_new_tokens = 24
    num_distractors = 9

    def __init__(self, corpus: Path = DEMO_CORPUS) -> None:
        self.path = corpus / "raw" / "captions" / "validation"

    def items(self) -> list[Item]:
        rows = [(row, document) for _, row, document in _shuffled(Captions, self.path)]
        captions = np.array(sorted({row["caption"] for row, _ in rows}))
        drawings = Counter(row["concept"] for row, _ in rows)
        generator = np.random.default_rng(_SEED)
        items = []
        for index, (row, document) in enumerate(rows):
            caption, prompt = row["caption"], (_image(document),)
            drawn = generator.choice(captions, self.num_distractors + 1, replace=False)
            distractors = [str(other) for other in drawn if other != caption][: self.num_distractors]
            candidates = [caption, *distractors]
            following = rows[index + 1 :] + rows[:index]
            other = (next(_image(document) for other, document in following if _differ(row, other)),)
            items.append(
                Item(
                    key=row["image"],
                    prompt=prompt,
                    reference=caption,
                    scored=tuple((image, candidate) for candidate in candidates for image in (prompt, other)),
                    groups=(row["kind"],),
                    cluster=row["concept"],
                    weight=1 / drawings[row["concept"]],
                )
            )
        return items

    def measure(self, item: Item, outcome: Outcome) -> Mapping[str, Measure]:
        true, other = outcome.scores[:2]
        pairs = zip(outcome.scores[::2], outcome.scores[1::2], strict=True)
        gain, *gains = [right.log_likelihood - wrong.log_likelihood for right, wrong in pairs]
        return {
            "loss_true_image": Measure(true.loss),
            "loss_other_image": Measure(other.loss),
            "loss_gain": Measure(other.loss - true.loss),
            "choice_accuracy": Measure(float(all(gain > distractor for distractor in gains))),
            "exact_match": Measure(float(outcome.text == item.reference)),
        }


class DemoQuestions:
    """Questions about held-out images of coloured shapes (easy-vqa's test split); accuracy of the generated answer.

    2,000 questions of its 9,673, drawn once.
    """

    max_new_tokens = 8
    num_questions = 2000

    def __init__(self, corpus: Path = DEMO_CORPUS) -> None:
        self.path = corpus / "raw" / "questions" / "validation"

    def items(self) -> list[Item]:
        items = []
        for key, row, document in _shuffled(Questions, self.path)[: self.num_questions]:
            image = _image(document)
            kind = question_type(row["answer"])
            items.append(
                Item(
                    key=key,
                    prompt=(image, Text(question_prompt(row["question"]))),
                    reference=row["answer"],
                    groups=(kind,) if kind == "yes-no" else (kind, "shape or colour"),
                    cluster=row["image"],
                )
            )
        return items

    def measure(self, item: Item, outcome: Outcome) -> Mapping[str, Measure]:
        return {"accuracy": Measure(float(outcome.text == item.reference))}


def question_type(answer: str) -> str:
    """ "yes-no", "shape" or "colour", by what is answered."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in SHAPES else "colour"


def _differ(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return row["concept"] != other["concept"] and row["caption"] != other["caption"]


def _image(document: Document) -> Image:
    image = document.parts[0]
    assert isinstance(image, Image)
    return image


def _shuffled(reader_class: type[JsonLinesReader], path: Path) -> list[tuple[str, dict[str, Any], Document]]:
    """(key, row, document) of every row, in an order drawn once."""
    if not path.is_dir():
        raise UserError(f"no demo corpus at {path}: build it with `mm1 data demo`")
    rows = list(_documents(reader_class(path)))
    return [rows[index] for index in np.random.default_rng(_SEED).permutation(len(rows))]


def _documents(reader: JsonLinesReader) -> Iterator[tuple[str, dict[str, Any], Document]]:
    for shard in reader.shards():
        for row in reader.rows(shard):
            if isinstance(row, Rejected):
                raise UserError(
                    f"the demo corpus is damaged: {row.key}: {row.reason}; build it again with `mm1 data demo`"
                )
            yield row.key, row.value, reader.document(row.value, row.key)
