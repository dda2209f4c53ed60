"""DocVQA: questions about scanned pages; 5,349 in the validation split.

{val,train}_v1.0_withQT.json, or {val,train}_v1.0.json   documents/: images
"""

from typing import Any

from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.strings import anls
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, read_list, texts_field
from megatron_mm1.evaluation.template import ANSWER_STOPPING


class DocVQA(Benchmark):
    """Evaluated on the validation split: the answers of the test split are not public."""

    stopping = ANSWER_STOPPING
    metric = staticmethod(anls)
    headline = "anls"

    def evaluation_records(self) -> Records:
        return self._records("val")

    def training_records(self) -> Records:
        return self._records("train")

    def _records(self, split: str) -> Records:
        older = self.folder / f"{split}_v1.0.json"
        file = older if older.exists() else self.folder / f"{split}_v1.0_withQT.json"
        return made(read_list(file, "data"), self._item, file=file)

    def _item(self, row: Any) -> Item:
        image, answers = text_field(row, "image"), texts_field(row, "answers")
        return Item(
            key=identifier(row, "questionId"),
            images=(self.images.find(image),),
            question=text_field(row, "question").strip(),
            answer=answers[0],
            references=answers,
            cluster=image,
        )
