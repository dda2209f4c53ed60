"""An evaluation task of one's own: which of two captions fits the image?

`mm1 eval --task caption_match.CaptionMatch ..`
"""

import os
from collections.abc import Sequence
from pathlib import Path

from csv_reader import CsvReader

from megatron_mm1.data.records import Document
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Candidate, ImageFile, Item, Split
from megatron_mm1.evaluation.task import Measure, Measures, Outcome
from megatron_mm1.evaluation.template import Stopping, Template


class CaptionMatch:
    """Each image of the CSV file $PAIRS with its caption and the caption of the next row."""

    stopping = Stopping(max_new_tokens=0)
    headline = "match"

    def items(self) -> Split:
        if "PAIRS" not in os.environ:
            raise UserError("caption_match reads the CSV file named by the environment variable PAIRS: set it")
        file = Path(os.environ["PAIRS"])
        documents = [record for record in CsvReader(file) if isinstance(record, Document)]
        captions = [document.parts[1].text for document in documents]
        items = []
        for document, caption, other in zip(documents, captions, captions[1:] + captions[:1], strict=True):
            image = ImageFile(file.parent / document.key)
            candidates = Candidate(caption), Candidate(other)
            items.append(Item(key=document.key, images=(image,), answer=caption, candidates=candidates))
        return Split.of(items, source=str(file))

    def demonstrations(self) -> Split:
        raise UserError("caption_match has no demonstrations: use 0 shots")

    def template(self, item: Item) -> Template:
        return Template(question="", cue="", answer="{answer}")

    def measure(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Sequence[Measures]:
        """The true caption has the lower loss per token; a tie is not right."""
        pairs = ([score.loss for score in outcome.scores] for outcome in outcomes)
        return [{"match": Measure(float(true < other))} for true, other in pairs]
