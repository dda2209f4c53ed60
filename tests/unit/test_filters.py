"""MM1's filters of interleaved documents: each rule on both sides of its limit."""

import io
import zlib

import PIL.Image
import pytest

from megatron_mm1.data.filters import InterleavedFilters, filter_document
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError

FILTERS = InterleavedFilters()
TEXT = Text("text")


def image(width: int = 100, height: int = 100, *, colour: int = 0, url: str = "") -> Image:
    content = io.BytesIO()
    PIL.Image.new("L", (width, height), colour).save(content, "PNG")
    return Image(content.getvalue(), url)


def dropped(*images: Image, filters: InterleavedFilters = FILTERS) -> list[Reason]:
    """Why images are left out of a document that another image keeps alive."""
    kept = image(120, 120, colour=255)
    document = filter_document(Document((TEXT, *images, kept), "key"), filters)
    assert isinstance(document, Document)
    assert kept in document.parts
    return list(document.dropped_images)


@pytest.mark.parametrize(
    ("width", "height", "reasons"),
    [
        (100, 100, []),
        (99, 100, [Reason.IMAGE_TOO_SMALL]),
        (100, 99, [Reason.IMAGE_TOO_SMALL]),
        (100, 200, []),
        (100, 201, [Reason.ASPECT_RATIO]),
        (201, 100, [Reason.ASPECT_RATIO]),
        (5001, 10_000, []),
        (5001, 10_001, [Reason.IMAGE_TOO_LARGE]),
        (20_000, 20_000, [Reason.IMAGE_TOO_LARGE]),
    ],
)
def test_sizes(width: int, height: int, reasons: list[Reason]) -> None:
    assert dropped(image(width, height)) == reasons


def test_a_header_that_cannot_be_read() -> None:
    assert dropped(Image(b""), Image(image().data[:20]), Image(b"GIF89a")) == [Reason.NOT_AN_IMAGE] * 3


def test_a_size_that_only_the_header_claims() -> None:
    data = bytearray(image().data)
    data[16:24] = (100_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    assert dropped(Image(bytes(data))) == [Reason.IMAGE_TOO_LARGE]


@pytest.mark.parametrize("word", ["logo", "button", "icon", "plugin", "widget"])
def test_urls_of_decorations(word: str) -> None:
    assert dropped(image(url=f"http://x/site-{word.upper()}.png"), image(colour=1, url="http://x/photo.png")) == [
        Reason.DECORATION
    ]


def test_the_first_of_repeated_images_is_kept() -> None:
    repeated = image(colour=7)
    document = Document((repeated, TEXT, image(colour=8), repeated, repeated), "key", (Reason.MISSING_IMAGE,))
    filtered = filter_document(document, FILTERS)
    assert isinstance(filtered, Document)
    assert filtered.parts == (repeated, TEXT, image(colour=8))
    assert filtered.dropped_images == (Reason.MISSING_IMAGE, *[Reason.REPEATED_IN_DOCUMENT] * 2)
    assert filter_document(document, InterleavedFilters(repeated_in_document=False)) == document


@pytest.mark.parametrize(
    ("count", "reason"), [(0, Reason.NO_IMAGES), (1, None), (30, None), (31, Reason.TOO_MANY_IMAGES)]
)
def test_number_of_images(count: int, reason: Reason | None) -> None:
    images = [image(colour=number) for number in range(count)]
    small = [image(10, 10)] * 40
    filtered = filter_document(Document((TEXT, Control("</s>"), *images, *small), "key"), FILTERS)
    if reason is None:
        assert isinstance(filtered, Document)
        assert filtered.parts == (TEXT, Control("</s>"), *images)
        assert len(filtered.dropped_images) == 40
    else:
        assert isinstance(filtered, Rejected)
        assert (filtered.key, filtered.reason) == ("key", reason)
        assert "image too small" in filtered.detail


def test_limits_can_be_set() -> None:
    filters = InterleavedFilters(max_aspect_ratio=4, min_side=10, max_side=120, decorations=("ad",))
    images = [image(10, 40), image(20, 20, url="x/logo"), image(20, 20, url="x/ad"), image(121, 121)]
    assert dropped(*images, filters=filters) == [Reason.DECORATION, Reason.IMAGE_TOO_LARGE]


@pytest.mark.parametrize(
    "wrong",
    [{"min_images": 5, "max_images": 4}, {"min_side": 9, "max_side": 8}, {"max_aspect_ratio": 0.5}, {"max_repeats": 0}],
)
def test_limits_that_contradict_one_another(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="filters: "):
        InterleavedFilters(**wrong)  # type: ignore[arg-type]
