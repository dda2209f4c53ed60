"""MathVista: mathematics in pictures; 1,000 questions in "testmini".

annot_testmini.json   images/   annot_demonstrations.json: for demonstrations (below)
"""

from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import mapping, text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.mathvista import mathvista_accuracy
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, read_json, texts_field
from megatron_mm1.evaluation.template import CHOICE, LETTERS, QUESTION, Stopping, Template

_ANSWER_TYPES = frozenset(("text", "integer", "float", "list"))


class MathVista(Benchmark):
    """It has no training split: demonstrations come from a file of the same form as `annot_testmini.json`.

    There, `solution` is the reasoning to the answer.
    """

    stopping = Stopping(max_new_tokens=64, strings=("\n", "Question:"))
    metric = staticmethod(mathvista_accuracy)

    def evaluation_records(self) -> Records:
        return self._records("testmini")

    def training_records(self) -> Records:
        return self._records("demonstrations")

    def template(self, item: Item) -> Template:
        return CHOICE if item.choices else QUESTION

    def _records(self, split: str) -> Records:
        file = self.folder / f"annot_{split}.json"
        problems = read_json(file)
        if not isinstance(problems, dict):
            raise UserError(f"{file} is not an object of problems: is it the benchmark's own file?")
        return made(problems.values(), self._item, file=file)

    def _item(self, row: Any) -> Item:
        answer, kind = text_field(row, "answer").strip(), text_field(row, "answer_type")
        if kind not in _ANSWER_TYPES:
            raise RejectRecord(Reason.WRONG_FIELDS, f"answer_type {kind!r}")
        choices = texts_field(row, "choices") if mapping(row).get("choices") else ()
        if choices and answer not in choices[: len(LETTERS)]:
            raise RejectRecord(Reason.WRONG_FIELDS, f"answer {answer!r} is no choice")
        solution, unit = row.get("solution"), row.get("unit")
        question = text_field(row, "question").strip()
        return Item(
            key=identifier(row, "pid"),
            images=(self.images.find(text_field(row, "image")),),
            question=f"{question} (Unit: {unit})" if isinstance(unit, str) and unit else question,
            answer=LETTERS[choices.index(answer)] if choices else answer,
            references=(answer,),
            choices=choices,
            rationale=solution.strip() if isinstance(solution, str) else "",
            attributes={"answer_type": kind, "precision": _precision(row, kind)},
            groups=(kind if not choices else "multiple choice",),
        )


def _precision(row: Any, kind: str) -> str:
    """Decimals of a float."""
    value = row.get("precision")
    if kind == "float" and not isinstance(value, int | float):
        raise RejectRecord(Reason.WRONG_FIELDS, "a float without a precision")
    return str(int(value)) if isinstance(value, int | float) else "0"
