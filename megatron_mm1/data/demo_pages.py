"""Turns the pages of GIMP's manual into interleaved documents: text with its images where they stand."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image

from megatron_mm1.data.demo_content import keyed, on_white, png_bytes, write_images, write_rows

MAX_IMAGE_SIDE = 256
"""px; screenshots are stored no larger."""


class PageParser(HTMLParser):
    """Collects a manual page's paragraphs and images in reading order, without its navigation."""

    _BLOCKS = frozenset(
        (
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "li",
            "dt",
            "dd",
            "td",
            "th",
            "pre",
            "div",
            "br",
            "tr",
            "table",
            "ul",
            "ol",
            "dl",
        )
    )
    _SKIPPED_CLASSES = frozenset(("navheader", "navfooter", "toc", "index", "footnotes"))

    def __init__(self, *, keep_image: Callable[[str], bool]) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        """("text", paragraph) or ("image", path as the page has it)."""
        self._keep_image = keep_image
        self._words: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in self._BLOCKS:
            self.flush()
        if self._skipping:
            self._skipping += tag == "div"
        elif tag == "head" or (tag == "div" and attributes.get("class") in self._SKIPPED_CLASSES):
            self._skipping = 1
        elif tag == "img" and self._keep_image(attributes.get("src") or ""):
            self.flush()
            self.blocks.append(("image", attributes["src"] or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self.flush()
        if self._skipping and tag in ("div", "head"):
            self._skipping -= 1

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._words.append(data)

    def flush(self) -> None:
        paragraph = " ".join("".join(self._words).split())
        self._words = []
        if paragraph:
            self.blocks.append(("text", paragraph))


class PageImages:
    """Which images documents keep, by MM1's filters [M] (but 64 px for its 100: screenshots are small)."""

    _MIN_SIDE, _MAX_ASPECT, _MAX_USES = 64, 2.0, 10
    _UNWANTED = re.compile("logo|button|icon|plugin|widget")

    def __init__(self, folder: Path, pages: Sequence[Path]) -> None:
        self._folder = folder
        self._usable: dict[str, bool] = {}
        uses = Counter(src for page in pages for src in self._sources(page))
        self._common = {src for src, count in uses.items() if count > self._MAX_USES}

    @staticmethod
    def _sources(page: Path) -> set[str]:
        return set(re.findall(r'<img [^>]*src="([^"]+)"', page.read_text("utf-8")))

    def usable(self, src: str) -> bool:
        if src not in self._usable:
            self._usable[src] = self._measure(src)
        return self._usable[src]

    def _measure(self, src: str) -> bool:
        file = self._folder / src
        if src in self._common or self._UNWANTED.search(src) or not file.is_file():
            return False
        with PIL.Image.open(file) as image:
            short, long = sorted(image.size)
        return short >= self._MIN_SIDE and long <= self._MAX_ASPECT * short


def read_pages(folder: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(name, blocks) of each page of the manual; an image stands only where the page first shows it [M]."""
    pages = sorted(page for page in folder.glob("*.html") if not page.name.startswith("gfdl"))
    images = PageImages(folder, pages)
    for page in pages:
        seen: set[str] = set()

        def first_time(src: str, seen: set[str] = seen) -> bool:
            new = src not in seen and images.usable(src)
            seen.add(src)
            return new

        parser = PageParser(keep_image=first_time)
        parser.feed(page.read_text("utf-8"))
        parser.close()
        parser.flush()
        yield page.name, parser.blocks


def cut_page(
    blocks: Sequence[tuple[str, str]], *, cost: Callable[[tuple[str, str]], int], limit: int
) -> Iterator[list]:
    """Runs of blocks of at most `limit` positions in all (one longer block stands alone)."""
    run: list[tuple[str, str]] = []
    total = 0
    for block in blocks:
        if run and total + cost(block) > limit:
            yield run
            run, total = [], 0
        run.append(block)
        total += cost(block)
    if run:
        yield run


def write_interleaved(
    output: Path,
    pages: Sequence[tuple[str, list[tuple[str, str]]]],
    *,
    folder: Path,
    num_tokens: Callable[[str], int],
    seed: int,
) -> dict[str, int]:
    """`train` and `validation` folders for the interleaved reader; a page is in one of them. Returns documents of each.

    Pages are cut between blocks to fit a sequence of 256 with 9 tokens per image; what has no image is left out [M].
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    sources: dict[Path, bytes] = {}
    for name, blocks in pages:
        split = "train" if keyed(seed, name) % 16 else "validation"
        cuts = cut_page(blocks, cost=lambda block: 9 if block[0] == "image" else num_tokens(block[1]) + 1, limit=250)
        for cut in cuts:
            images: list[str | None] = []
            texts: list[str | None] = []
            for kind, value in cut:
                if kind == "image":
                    stored = Path(value).with_suffix(".png").as_posix()
                    sources.setdefault(output / split / stored, (folder / value).read_bytes())
                    images.append(stored)
                    texts.append(None)
                elif texts and texts[-1] is not None:
                    texts[-1] += value + "\n"
                else:
                    images.append(None)
                    texts.append(value + "\n")
            if any(images):
                rows[split].append({"page": name, "images": images, "texts": texts})
    write_images(sources, _page_image)
    for split, split_rows in rows.items():
        write_rows(output / split / "documents.jsonl", split_rows)
    return {split: len(split_rows) for split, split_rows in rows.items()}


def _page_image(data: bytes) -> bytes:
    image = on_white(data)
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), PIL.Image.Resampling.BICUBIC)
    return png_bytes(image)
