"""POPE: is an object in the image? 3,000 questions about COCO images for each of three ways to choose absent objects.

coco_pope_{random,popular,adversarial}.json: JSON lines   val2014/: images
"""

import json
from itertools import chain
from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.data.records import Reason
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.pope import pope
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, read_lines

_STRATEGIES = ("random", "popular", "adversarial")


class POPE(Benchmark):
    """Figures over all questions and by strategy; published ones are often the mean of the three strategies' F1."""

    metric = staticmethod(pope)
    headline = "f1"

    def evaluation_records(self) -> Records:
        return chain.from_iterable(map(self._records, _STRATEGIES))

    def _records(self, strategy: str) -> Records:
        file = self.folder / f"coco_pope_{strategy}.json"
        return made(read_lines(file), lambda line: self._item(line, strategy), file=file)

    def _item(self, line: str, strategy: str) -> Item:
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise RejectRecord(Reason.NOT_JSON, str(error)) from None
        image, label = text_field(row, "image"), text_field(row, "label")
        if label not in ("yes", "no"):
            raise RejectRecord(Reason.WRONG_FIELDS, f"label {label!r}")
        return Item(
            key=f"{strategy}:{identifier(row, 'question_id')}",
            images=(self.images.find(f"val2014/{image}"),),
            question=text_field(row, "text").strip(),
            answer=label,
            groups=(strategy,),
            cluster=image,
        )
