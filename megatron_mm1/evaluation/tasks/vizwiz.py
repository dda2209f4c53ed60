"""VizWiz-VQA: questions that blind people asked about their photographs; 4,319 in the validation split.

Annotations/val.json, Annotations/train.json   val/, train/: images
"""

from typing import Any

from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.base import OpenQuestionBenchmark
from megatron_mm1.evaluation.tasks.files import Records, made, most_common, read_list, texts_of


class VizWiz(OpenQuestionBenchmark):
    """One question for each image; "unanswerable" is an answer like others."""

    def evaluation_records(self) -> Records:
        return self._records("val")

    def training_records(self) -> Records:
        return self._records("train")

    def _records(self, split: str) -> Records:
        file = self.folder / "Annotations" / f"{split}.json"
        return made(read_list(file), lambda row: self._item(row, split), file=file)

    def _item(self, row: Any, split: str) -> Item:
        name, answers = text_field(row, "image"), texts_of(row, "answers", "answer")
        kind = row.get("answer_type")
        return Item(
            key=name,
            images=(self.images.find(f"{split}/{name}"),),
            question=text_field(row, "question").strip(),
            answer=most_common(answers),
            references=answers,
            groups=(kind,) if isinstance(kind, str) else (),
        )
