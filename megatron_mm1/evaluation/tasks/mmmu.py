"""MMMU: college questions over 30 subjects, with one or several images; 900 in the validation split.

{Subject}/validation-*.parquet, {Subject}/dev-*.parquet, as the Hugging Face data set has them
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import ImageFile, Item
from megatron_mm1.evaluation.metrics.mmmu import mmmu_accuracy
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made
from megatron_mm1.evaluation.template import ANSWER_STOPPING, CHOICE, LETTERS, QUESTION, Template

_MAX_IMAGES = 7
_MARK = re.compile(r"<image (\d+)>")
_TEXTS = ("id", "question", "options", "explanation", "answer", "question_type")


class MMMU(Benchmark):
    """Demonstrations come from the five "dev" questions of each subject, most of which carry an explanation."""

    stopping = ANSWER_STOPPING
    metric = staticmethod(mmmu_accuracy)

    def evaluation_records(self) -> Records:
        return self._records("validation")

    def training_records(self) -> Records:
        return self._records("dev")

    def template(self, item: Item) -> Template:
        return CHOICE if item.choices else QUESTION

    def _records(self, split: str) -> Records:
        files = sorted(self.folder.glob(f"*/{split}-*.parquet"))
        if not files:
            raise UserError(f"no */{split}-*.parquet in {self.folder}: it needs a folder for each subject")
        for file in files:
            yield from made(_rows(file), lambda row, file=file: _item(row, file), file=file)  # type: ignore[misc]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The texts of each row, its number, and which images it has."""
    try:
        table = pq.read_table(file)
        images = [name for number in range(1, _MAX_IMAGES + 1) if (name := f"image_{number}") in table.column_names]
        has_image = {name: table[name].is_valid().to_pylist() for name in images}
        texts = table.select([name for name in _TEXTS if name in table.column_names]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is no Parquet table that can be read ({error}): download it again") from None
    for number, row in enumerate(texts):
        yield {**row, "row": number, "images": [name for name in images if has_image[name][number]]}


def _item(row: dict[str, Any], file: Path) -> Item:
    question, choices = text_field(row, "question").strip(), _choices(row)
    marks = {int(number) for text in (question, *choices) for number in _MARK.findall(text)}
    if [f"image_{number}" for number in range(1, len(row["images"]) + 1)] != row["images"] or not row["images"]:
        raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"images {', '.join(row['images']) or 'none'}")
    if marks - set(range(1, len(row["images"]) + 1)):
        raise RejectRecord(Reason.IMAGE_MARKS, f"marks {sorted(marks)} and {len(row['images'])} images")
    answer, explanation = text_field(row, "answer").strip(), row.get("explanation")
    if choices and answer not in LETTERS[: len(choices)]:
        raise RejectRecord(Reason.WRONG_FIELDS, f"answer {answer!r} of {len(choices)} choices")
    return Item(
        key=identifier(row, "id"),
        images=tuple(ImageFile(file, row["row"], name) for name in row["images"]),
        question=question,
        answer=answer,
        references=() if choices else _answers(answer),
        choices=choices,
        rationale=explanation.strip() if isinstance(explanation, str) else "",
        groups=(file.parent.name,),
    )


def _choices(row: dict[str, Any]) -> tuple[str, ...]:
    """The table has them as the text of a Python list; none for open questions."""
    if row.get("question_type") != "multiple-choice":
        return ()
    choices = _literal(text_field(row, "options"))
    if not isinstance(choices, list) or not 0 < len(choices) <= len(LETTERS):
        raise RejectRecord(Reason.WRONG_FIELDS, "options are no list")
    return tuple(str(choice).strip() for choice in choices)


def _answers(answer: str) -> tuple[str, ...]:
    """Some open questions have several, as the text of a Python list."""
    answers = _literal(answer) if answer.startswith("[") else None
    return tuple(map(str, answers)) if isinstance(answers, list) and answers else (answer,)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
