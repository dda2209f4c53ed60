"""A task whose answers cannot be known but from its demonstrations."""

from pathlib import Path

import numpy as np
import PIL.Image

from megatron_mm1.evaluation.items import ImageFile, Item, Split
from megatron_mm1.evaluation.metrics.strings import exact_match
from megatron_mm1.evaluation.template import QUESTION, Stopping

WORDS = {0: "blicket", 1: "dax", 2: "wug"}
"""By the channel that is brightest in a picture; no picture is twice there."""


class NewWords:
    """Which word goes with a picture is said in demonstrations only."""

    headline = "exact_match"

    def __init__(self, folder: Path, *, num_items: int = 40) -> None:
        self.stopping = Stopping(max_new_tokens=4)
        self._items = tuple(_item(folder, f"query {number}", number) for number in range(num_items))
        self._pool = tuple(_item(folder, f"demonstration {number}", number) for number in range(30))

    def items(self) -> Split:
        return Split.of(self._items, source="queries")

    def demonstrations(self) -> Split:
        return Split.of(self._pool, source="demonstrations")

    def template(self, item):
        return QUESTION

    def measure(self, items, outcomes):
        return exact_match(items, [outcome.text for outcome in outcomes])


def _item(folder: Path, key: str, number: int) -> Item:
    path = folder / f"{key}.png"
    if not path.exists():
        pixels = np.random.default_rng(list(key.encode())).integers(0, 100, (8, 8, 3), np.uint8)
        pixels[..., number % 3] += 120
        PIL.Image.fromarray(pixels).save(path)
    return Item(key=key, images=(ImageFile(path),), question="what is it?", answer=WORDS[number % 3])
