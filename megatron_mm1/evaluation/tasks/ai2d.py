"""AI2D: multiple choice about diagrams of grade school science; 3,088 questions in the test split.

questions/*.json   images/   ai2d_test_ids.csv   abc_images/: diagrams with letters in place of labels, for questions
about those
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import mapping, text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.choice import choice_accuracy
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, index_field, made, read_json, read_lines, texts_field
from megatron_mm1.evaluation.template import ANSWER_STOPPING, CHOICE, LETTERS


class AI2D(Benchmark):
    """Images of `ai2d_test_ids.csv` are evaluated; all others demonstrate."""

    form = CHOICE
    stopping = ANSWER_STOPPING
    metric = staticmethod(choice_accuracy)

    def evaluation_records(self) -> Records:
        return self._records(is_test=True)

    def training_records(self) -> Records:
        return self._records(is_test=False)

    def _records(self, *, is_test: bool) -> Records:
        test = set(read_lines(self.folder / "ai2d_test_ids.csv"))
        for file in sorted((self.folder / "questions").glob("*.json")):
            if (file.name.partition(".")[0] in test) is is_test:
                yield from made(_questions(file), self._item, file=file)

    def _item(self, row: Any) -> Item:
        choices = texts_field(row, "answerTexts")
        if len(choices) > len(LETTERS):
            raise RejectRecord(Reason.WRONG_FIELDS, f"{len(choices)} choices")
        image = text_field(row, "imageName")
        folder = "abc_images" if row.get("abcLabel") else "images"
        return Item(
            key=text_field(row, "questionId"),
            images=(self.images.find(f"{folder}/{image}"),),
            question=text_field(row, "question").strip(),
            answer=LETTERS[index_field(row, "correctAnswer", below=len(choices))],
            choices=choices,
            cluster=image,
        )


def _questions(file: Path) -> Iterator[Any]:
    """Each question of an image's file, with its text and the image's name; anything else as it is."""
    content = read_json(file)
    questions = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(questions, dict):
        yield content
        return
    for question, row in questions.items():
        try:
            yield {**mapping(row), "question": question, "imageName": content.get("imageName")}
        except RejectRecord:
            yield row
