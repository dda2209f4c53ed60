"""COCO captions in Karpathy's split: 5,000 test images, five captions each.

dataset_coco.json   val2014/, train2014/: images
"""

from typing import Any

from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.base import CaptionBenchmark
from megatron_mm1.evaluation.tasks.files import ImageFolder, Records, identifier, made, read_list, texts_of


class CocoCaptions(CaptionBenchmark):
    """Evaluated on "test"; demonstrations from "train" and "restval"."""

    def evaluation_records(self) -> Records:
        return self._records("test")

    def training_records(self) -> Records:
        return self._records("train", "restval")

    def _records(self, *splits: str) -> Records:
        file = self.folder / "dataset_coco.json"
        rows = [row for row in read_list(file, "images") if not isinstance(row, dict) or row.get("split") in splits]
        return made(rows, lambda row: _item(row, self.images), file=file)


def _item(row: Any, images: ImageFolder) -> Item:
    image = images.find(f"{text_field(row, 'filepath')}/{text_field(row, 'filename')}")
    captions = texts_of(row, "sentences", "raw")
    return Item(key=identifier(row, "cocoid"), images=(image,), answer=captions[0], references=captions)
