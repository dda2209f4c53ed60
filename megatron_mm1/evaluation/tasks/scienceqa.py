"""ScienceQA, the questions with an image: 2,017 in the test split.

problems.json, pid_splits.json   images/{test,train}/{id}/image.png
"""

from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import mapping, text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.choice import choice_accuracy
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, index_field, made, read_json, read_list, texts_field
from megatron_mm1.evaluation.template import ANSWER_STOPPING, CHOICE, LETTERS


class ScienceQAImages(Benchmark):
    """Demonstrations with chain of thought show the lecture and the solution."""

    form = CHOICE
    stopping = ANSWER_STOPPING
    metric = staticmethod(choice_accuracy)

    def evaluation_records(self) -> Records:
        return self._records("test")

    def training_records(self) -> Records:
        return self._records("train")

    def _records(self, split: str) -> Records:
        file = self.folder / "problems.json"
        problems = read_json(file)
        if not isinstance(problems, dict):
            raise UserError(f"{file} is not an object of problems: is it the benchmark's own file?")
        rows = [(str(key), problems.get(key)) for key in read_list(self.folder / "pid_splits.json", split)]
        with_image = [(key, row) for key, row in rows if not isinstance(row, dict) or row.get("image")]
        return made(with_image, lambda pair: self._item(pair[0], pair[1], split), file=file)

    def _item(self, key: str, row: Any, split: str) -> Item:
        choices = texts_field(row, "choices")
        if len(choices) > len(LETTERS):
            raise RejectRecord(Reason.WRONG_FIELDS, f"{len(choices)} choices")
        question, hint = text_field(row, "question").strip(), _optional(row, "hint")
        return Item(
            key=key,
            images=(self.images.find(f"images/{split}/{key}/{text_field(row, 'image')}"),),
            question=f"{question}\nContext: {hint}" if hint else question,
            answer=LETTERS[index_field(row, "answer", below=len(choices))],
            choices=choices,
            rationale=" ".join(filter(None, (_optional(row, "lecture"), _optional(row, "solution")))),
            groups=(text_field(row, "subject"),),
        )


def _optional(row: Any, name: str) -> str:
    value = mapping(row).get(name)
    return value.strip() if isinstance(value, str) else ""
