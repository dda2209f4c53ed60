"""ChartQA: questions about charts, written by people and by a model; 2,500 in the test split.

{test,train}/{test,train}_{human,augmented}.json   {test,train}/png/: images
"""

from itertools import chain
from typing import Any

from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.strings import relaxed_accuracy
from megatron_mm1.evaluation.tasks.base import Benchmark
from megatron_mm1.evaluation.tasks.files import Records, made, read_list
from megatron_mm1.evaluation.template import ANSWER_STOPPING

_WRITERS = ("human", "augmented")


class ChartQA(Benchmark):
    """Figures over all questions, which are as many from either source, and by source."""

    stopping = ANSWER_STOPPING
    metric = staticmethod(relaxed_accuracy)
    headline = "relaxed_accuracy"

    def evaluation_records(self) -> Records:
        return chain.from_iterable(self._records("test", writer) for writer in _WRITERS)

    def training_records(self) -> Records:
        return chain.from_iterable(self._records("train", writer) for writer in _WRITERS)

    def _records(self, split: str, writer: str) -> Records:
        file = self.folder / split / f"{split}_{writer}.json"
        numbered = enumerate(read_list(file))
        return made(numbered, lambda pair: self._item(*pair, split=split, writer=writer), file=file)

    def _item(self, number: int, row: Any, *, split: str, writer: str) -> Item:
        image = text_field(row, "imgname")
        return Item(
            key=f"{split}:{writer}:{number}",  # the files have no ids
            images=(self.images.find(f"{split}/png/{image}"),),
            question=text_field(row, "query").strip(),
            answer=text_field(row, "label").strip(),
            groups=(writer,),
            cluster=image,
        )
