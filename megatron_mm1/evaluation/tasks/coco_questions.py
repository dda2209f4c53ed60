"""Questions about COCO images in the form of the VQA challenge: a file of questions and one of answers."""

from pathlib import Path
from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.files import ImageFolder, Records, identifier, made, most_common, read_list, texts_of


def question_records(
    images: ImageFolder, *, questions: Path, annotations: Path, image_folder: str, answer_field: str
) -> Records:
    """Every question with its ten answers.

    Args:
        image_folder: "val2014" or "train2014", which is in the images' names too.
        answer_field: of each answer.

    Raises:
        UserError: a file is missing or of another layout.
    """
    rows = read_list(annotations, "annotations")
    answers = {row["question_id"]: row for row in rows if isinstance(row, dict) and "question_id" in row}

    def item(row: Any) -> Item:
        key, image_id = identifier(row, "question_id"), identifier(row, "image_id")
        annotation = answers.get(row["question_id"])
        if annotation is None:
            raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"question {key} is not in {annotations.name}")
        given = texts_of(annotation, "answers", answer_field)
        kind = annotation.get("answer_type")
        return Item(
            key=key,
            images=(images.find(f"{image_folder}/COCO_{image_folder}_{image_id.zfill(12)}.jpg"),),
            question=text_field(row, "question").strip(),
            answer=most_common(given),
            references=given,
            groups=(kind,) if isinstance(kind, str) else (),
            cluster=image_id,
        )

    return made(read_list(questions, "questions"), item, file=questions)
