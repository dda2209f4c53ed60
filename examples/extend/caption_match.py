"""An evaluation task of one's own: which of two captions fits the image?

`mm1 eval --task caption_match.CaptionMatch ..`
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from csv_reader import CsvReader

from megatron_mm1.data.records import Document
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.task import Item, Measure, Outcome


class CaptionMatch:
    """Each image of the CSV file $PAIRS with its caption and the caption of the next row."""

    max_new_tokens = 0

    def items(self) -> Sequence[Item]:
        if "PAIRS" not in os.environ:
            raise UserError("caption_match reads the CSV file named by the environment variable PAIRS: set it")
        records = CsvReader(Path(os.environ["PAIRS"]))
        documents = [record for record in records if isinstance(record, Document)]
        items = []
        for document, other in zip(documents, documents[1:] + documents[:1], strict=True):
            image, caption = document.parts
            candidates = ((image,), caption.text), ((image,), other.parts[1].text)
            items.append(Item(key=document.key, prompt=(image,), reference=caption.text, scored=candidates))
        return items

    def measure(self, item: Item, outcome: Outcome) -> Mapping[str, Measure]:
        """The true caption has the lower loss per token; a tie is not right."""
        true, other = (score.loss for score in outcome.scores)
        return {"match": Measure(float(true < other))}
