"""TextVQA: questions about text in images, ten answers each; 5,000 in the validation split.

TextVQA_0.5.1_val.json, TextVQA_0.5.1_train.json   train_images/: images of both
"""

from typing import Any

from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.base import OpenQuestionBenchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, most_common, read_list, texts_field


class TextVQA(OpenQuestionBenchmark):
    """Models are given the image alone, without the text that others read out of it."""

    def evaluation_records(self) -> Records:
        return self._records("val")

    def training_records(self) -> Records:
        return self._records("train")

    def _records(self, split: str) -> Records:
        file = self.folder / f"TextVQA_0.5.1_{split}.json"
        return made(read_list(file, "data"), self._item, file=file)

    def _item(self, row: Any) -> Item:
        image, answers = identifier(row, "image_id"), texts_field(row, "answers")
        return Item(
            key=identifier(row, "question_id"),
            images=(self.images.find(f"train_images/{image}.jpg"),),
            question=text_field(row, "question").strip(),
            answer=most_common(answers),
            references=answers,
            cluster=image,
        )
