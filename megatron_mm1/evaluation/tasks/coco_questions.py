"""Questions about COCO images in the form of the VQA challenge: a file of questions and one of answers."""

from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.base import OpenQuestionBenchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, most_common, read_list, texts_of


class COCOQuestions(OpenQuestionBenchmark):
    """Every question with its ten answers, of COCO's splits of 2014.

    Attributes:
        prefix: of the files' names.
        answer_field: of each answer.
    """

    prefix: str
    answer_field: str

    def evaluation_records(self) -> Records:
        return self._records("val2014")

    def training_records(self) -> Records:
        return self._records("train2014")

    def _records(self, split: str) -> Records:
        questions = self.folder / f"{self.prefix}OpenEnded_mscoco_{split}_questions.json"
        annotations = self.folder / f"{self.prefix}mscoco_{split}_annotations.json"
        rows = read_list(annotations, "annotations")
        answers = {row["question_id"]: row for row in rows if isinstance(row, dict) and "question_id" in row}

        def item(row: Any) -> Item:
            key, image_id = identifier(row, "question_id"), identifier(row, "image_id")
            annotation = answers.get(row["question_id"])
            if annotation is None:
                raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"question {key} is not in {annotations.name}")
            given = texts_of(annotation, "answers", self.answer_field)
            kind = annotation.get("answer_type")
            return Item(
                key=key,
                images=(self.images.find(f"{split}/COCO_{split}_{image_id.zfill(12)}.jpg"),),
                question=text_field(row, "question").strip(),
                answer=most_common(given),
                references=given,
                groups=(kind,) if isinstance(kind, str) else (),
                cluster=image_id,
            )

        return made(read_list(questions, "questions"), item, file=questions)
