"""nocaps: 4,500 validation images with ten captions each, of objects that COCO has or has not.

nocaps_val_4500_captions.json   val/: images   coco/: the folder of the COCO task, for demonstrations
"""

from collections import defaultdict
from typing import Any

from megatron_mm1.data.readers.fields import text_field
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.tasks.base import CaptionBenchmark
from megatron_mm1.evaluation.tasks.coco import CocoCaptions
from megatron_mm1.evaluation.tasks.files import Records, identifier, made, read_list, texts_field


class NoCaps(CaptionBenchmark):
    """Evaluated on the validation images, also by domain; it has no training images, so COCO's demonstrate."""

    def evaluation_records(self) -> Records:
        file = self.folder / "nocaps_val_4500_captions.json"
        captions: dict[Any, list[Any]] = defaultdict(list)
        for row in read_list(file, "annotations"):
            if isinstance(row, dict):
                captions[row.get("image_id")].append(row.get("caption"))
        rows = [
            {**row, "captions": captions.get(row.get("id"), [])} if isinstance(row, dict) else row
            for row in read_list(file, "images")
        ]
        return made(rows, self._item, file=file)

    def training_records(self) -> Records:
        return CocoCaptions(self.folder / "coco").training_records()

    def _item(self, row: Any) -> Item:
        image = self.images.find(f"val/{text_field(row, 'file_name')}")
        captions = texts_field(row, "captions")
        domain = text_field(row, "domain")
        key = identifier(row, "id")
        return Item(key=key, images=(image,), answer=captions[0], references=captions, groups=(domain,))
