"""TextCaps: captions of images with text in them; 3,166 validation images, five captions each.

TextCaps_0.1_val.json, TextCaps_0.1_train.json   train_images/: images of both
"""

from typing import Any

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.base import CaptionBenchmark
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, read_list, texts_field


class TextCaps(CaptionBenchmark):
    """The files have a row for each caption, and all captions of its image in every row."""

    def evaluation_records(self) -> Records:
        return self._records("val")

    def training_records(self) -> Records:
        return self._records("train")

    def _records(self, split: str) -> Records:
        file = self.folder / f"TextCaps_0.1_{split}.json"
        rows: dict[Any, Any] = {}
        for number, row in enumerate(read_list(file, "data")):
            image = row.get("image_id") if isinstance(row, dict) else None
            rows.setdefault(image if isinstance(image, str) else number, row)
        return made(rows.values(), self._item, file=file)

    def _item(self, row: Any) -> Item:
        key = identifier(row, "image_id")
        captions = texts_field(row, "reference_strs")
        image = self.images.find(f"train_images/{key}.jpg")
        return Item(key=key, images=(image,), answer=captions[0], references=captions)
