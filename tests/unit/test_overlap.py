"""Contamination: what is found between two data sets, and what is not."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm1.cli import main
from megatron_mm1.data.overlap import Kind, Settings, find_overlap, open_data_set
from megatron_mm1.data.overlap.fingerprints import perceptual_hash, run_hashes, words_of
from megatron_mm1.data.overlap.index import NearPostings, Postings
from megatron_mm1.data.overlap.search import LISTED
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.readers import open_reader
from megatron_mm1.errors import UserError
from tests.corpora import encoded, small_tokenizer, write_jsonl

HASHES = st.lists(st.integers(0, (1 << 64) - 1), max_size=4)


def captions(folder: Path, rows: list[tuple[bytes, str]]) -> str:
    """A caption data set of (encoded image, caption) pairs, as `READER:PATH`."""
    folder.mkdir()
    for n, (image, _) in enumerate(rows):
        (folder / f"{n}.img").write_bytes(image)
    write_jsonl(folder / "captions.jsonl", [{"image": f"{n}.img", "caption": text} for n, (_, text) in enumerate(rows)])
    return f"captions:{folder}"


def texts(file: Path, lines: list[str]) -> str:
    file.write_text("".join(line + "\n" for line in lines))
    return f"text:{file}"


def hits(a: str, b: str, **options: int) -> list[tuple[int, int, Kind]]:
    """(number in b, number in a, kind) of every hit."""
    data_sets = [open_data_set(name, tokenizer=None) for name in (a, b)]
    keys = [
        [sample.key for shard in data_set.shards() for sample in data_set.read(shard) if sample is not None]
        for data_set in data_sets
    ]
    found = find_overlap(*data_sets, settings=Settings(**options))
    return [(keys[1].index(hit.b), keys[0].index(hit.a), hit.kind) for _, hit in found.hits]


def report_of(a: str, b: str, file: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of the command."""
    code = main(["data", "overlap", a, b, "--output", str(file), "--num-workers", "1", *options])
    return code, json.loads(file.read_text())


def reencoded(image: bytes, format: str, *, scale: float = 1.0, **options: Any) -> bytes:
    picture = PIL.Image.open(io.BytesIO(image)).convert("RGBA")
    picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    size = tuple(round(side * scale) for side in picture.size)
    content = io.BytesIO()
    picture.resize(size, PIL.Image.Resampling.BICUBIC).save(content, format, **options)
    return content.getvalue()


# Text


@pytest.mark.parametrize(
    "text",
    [
        "A big, red SQUARE!",
        "  a big\n\tred   square ",
        "«a big red square»",
        "a big re\uff44 square",
        "a BIG-red (square)…",
    ],
)
def test_copies_of_a_text_have_the_same_words(text: str) -> None:
    assert words_of(text) == ["a", "big", "red", "square"]


def test_unspaced_scripts_count_characters_as_words() -> None:
    assert words_of("赤い丸、red 円") == ["赤", "い", "丸", "red", "円"]
    assert words_of("STRASSE ﬁne") == words_of("straße fine")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_run_hashes_meet_where_texts_share_a_run(first: list[str], second: list[str], length: int) -> None:
    runs = [{tuple(words[n : n + length]) for n in range(len(words) - length + 1)} for words in (first, second)]
    hashes = [set(run_hashes(words, length).tolist()) for words in (first, second)]
    assert [len(some) for some in hashes] == [len(some) for some in runs]
    assert len(hashes[0] & hashes[1]) == len(runs[0] & runs[1])


def test_whole_texts_and_runs(tmp_path: Path) -> None:
    a = texts(tmp_path / "a.txt", ["zero", "One two three four FIVE six!", "x one two three y", "one two four three"])
    b = texts(tmp_path / "b.txt", ["one, two, three: four five six", "nothing of it"])
    assert hits(a, b, text_words=3) == [
        (0, 1, Kind.TEXT),
        (0, 1, Kind.TEXT_RUN),
        (0, 2, Kind.TEXT_RUN),
    ]
    assert hits(a, b, text_words=4) == [(0, 1, Kind.TEXT), (0, 1, Kind.TEXT_RUN)]
    assert hits(a, b, text_words=0) == [(0, 1, Kind.TEXT)]


# Images


@pytest.mark.parametrize("distance", [0, 4, 16])
@settings(deadline=None)
@given(documents=st.lists(HASHES, max_size=8), flips=st.lists(st.sets(st.integers(0, 63), max_size=18), max_size=6))
def test_every_hash_within_the_distance_is_found_and_no_other(
    distance: int, documents: list[list[int]], flips: list[set[int]]
) -> None:
    known = [value for some in documents for value in some] or [0]
    asked = [known[n % len(known)] ^ sum(1 << bit for bit in bits) for n, bits in enumerate(flips)]
    nearest = [
        min(((x ^ y).bit_count() for x in some for y in asked), default=64) if some else 64 for some in documents
    ]
    index = NearPostings([np.array(some, np.uint64) for some in documents], distance=distance)
    found, distances = index.documents(np.array(asked, np.uint64))
    assert dict(zip(found.tolist(), distances.tolist(), strict=True)) == {
        n: bits for n, bits in enumerate(nearest) if bits <= distance
    }


@pytest.mark.parametrize("distance", range(17))
def test_bits_that_differ_all_over_the_hash_do_not_hide_it(distance: int) -> None:
    changed = sum(1 << (64 * n // distance) for n in range(distance))
    index = NearPostings([np.array([0], np.uint64)], distance=distance)
    found, distances = index.documents(np.array([changed], np.uint64))
    assert (found.tolist(), distances.tolist()) == ([0], [distance])


@given(documents=st.lists(st.lists(st.integers(0, 9)), max_size=6), asked=st.lists(st.integers(0, 12), max_size=5))
def test_postings(documents: list[list[int]], asked: list[int]) -> None:
    found = Postings(np.array(some, np.uint64) for some in documents).documents(np.array(asked, np.uint64))
    assert found.tolist() == [n for n, some in enumerate(documents) if set(some) & set(asked)]


@pytest.mark.parametrize("image", [encoded("JPEG")[:200], encoded()[:60], b"", b"no image"])
def test_damaged_images_have_no_perceptual_hash(image: bytes) -> None:
    assert perceptual_hash(image) is None


def test_blank_images_are_compared_by_their_bytes_alone(tmp_path: Path) -> None:
    def blank(grey: int) -> bytes:
        content = io.BytesIO()
        PIL.Image.new("L", (40, 30), grey).save(content, "PNG")
        return content.getvalue()

    a = captions(tmp_path / "a", [(blank(0), "one"), (blank(255), "two")])
    b = captions(tmp_path / "b", [(blank(255), "three")])
    code, report = report_of(a, b, tmp_path / "report.json")
    assert code == 1 and [hit["kind"] for hit in report["hits"]] == [Kind.IMAGE]
    assert (report["a"]["unhashed"], report["b"]["unhashed"]) == (2, 1)


def test_upright_copy_of_a_turned_photograph_is_found() -> None:
    turned = PIL.Image.open(io.BytesIO(encoded(size=(80, 48), seed=3)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    contents = [io.BytesIO(), io.BytesIO()]
    turned.save(contents[0], "JPEG", quality=95, exif=exif)
    turned.transpose(PIL.Image.Transpose.ROTATE_270).save(contents[1], "JPEG", quality=95)
    first, second = (perceptual_hash(content.getvalue()) for content in contents)
    assert first is not None and second is not None and (first ^ second).bit_count() <= 4


@pytest.mark.demo
def test_copies_of_real_pictures_are_found_and_other_pictures_are_not(tmp_path: Path, demo_corpus: Path) -> None:
    folder = demo_corpus / "raw" / "interleaved" / "validation"
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".png", ".jpg"))
    pictures = {perceptual_hash(file.read_bytes()): file.read_bytes() for file in files}
    pictures.pop(None, None)
    far: list[int] = []  # pictures of which no two are alike, so that what is found is known
    for value in pictures:
        if all((value ^ other).bit_count() > 16 for other in far):
            far.append(value)
    originals = [pictures[value] for value in far][:30]
    assert len(originals) >= 10
    a = captions(tmp_path / "a", [(image, f"training {n}") for n, image in enumerate(originals)])
    changes: dict[str, Callable[[bytes], bytes]] = {
        "quality 50": lambda image: reencoded(image, "JPEG", quality=50),
        "quality 95": lambda image: reencoded(image, "JPEG", quality=95),
        "resized": lambda image: reencoded(image, "PNG", scale=0.6),
        "larger webp": lambda image: reencoded(image, "WEBP", scale=1.7),
    }
    for name, change in changes.items():
        b = captions(tmp_path / name, [(change(image), f"held out {n}") for n, image in enumerate(originals)])
        found = [(hit_b, hit_a) for hit_b, hit_a, kind in hits(a, b) if kind == Kind.SIMILAR_IMAGE]
        assert {hit_b for hit_b, hit_a in found if hit_b == hit_a} == {hit_b for hit_b, _ in found}, name
        assert len(found) >= 0.95 * len(originals), name
        assert Kind.IMAGE not in {kind for *_, kind in hits(a, b)}


# Data sets, processes and the command


def test_prepared_folder_gives_what_its_raw_data_gives(tmp_path: Path) -> None:
    words = "green circles and a blue one"
    rows = [(encoded(seed=n, size=(64, 48)), f"the big red square of {n} {words}") for n in range(6)]
    raw = captions(tmp_path / "raw", rows)
    b = captions(tmp_path / "b", [rows[2], (encoded(seed=99, size=(64, 48)), "nothing like it"), (rows[4][0], "small")])
    tokenizer = small_tokenizer(tmp_path)
    prepare(open_reader("captions", tmp_path / "raw"), tokenizer=tokenizer, output=tmp_path / "prepared")
    reports = [
        report_of(name, b, tmp_path / "report.json", "--tokenizer", str(tokenizer.path))[1]
        for name in (raw, str(tmp_path / "prepared"))
    ]
    assert reports[0]["hits"] == reports[1]["hits"]
    assert {hit["kind"] for hit in reports[0]["hits"]} == set(Kind)


def test_text_around_an_image_does_not_run_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "i.png").write_bytes(encoded(seed=ord(name)))
    row = {"images": [None, "i.png", None], "texts": ["one two", None, "three four"]}
    write_jsonl(tmp_path / "a" / "documents.jsonl", [row])
    write_jsonl(tmp_path / "b" / "documents.jsonl", [{"images": [None], "texts": ["one two three four"]}])
    tokenizer = small_tokenizer(tmp_path)
    prepare(open_reader("interleaved", tmp_path / "a"), tokenizer=tokenizer, output=tmp_path / "prepared")
    for a in (f"interleaved:{tmp_path / 'a'}", str(tmp_path / "prepared")):
        code, report = report_of(
            a, f"interleaved:{tmp_path / 'b'}", tmp_path / "report.json", "--tokenizer", str(tokenizer.path)
        )
        assert code == 1 and [hit["kind"] for hit in report["hits"]] == [Kind.TEXT]


def test_processes_do_not_change_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(5):
        texts(folder / f"{n}.txt", ["one two three", f"file {n} has this", "one two"] * 40)
    b = texts(tmp_path / "b.txt", ["one two three", "file 3 has this", "one two"])
    reports = [
        report_of(f"text:{folder}", b, tmp_path / "report.json", "--text-words", "2", "--num-workers", workers)[1]
        for workers in ("1", "3")
    ]
    assert reports[0] == reports[1]
    assert reports[0]["kinds"][Kind.TEXT] == {"a_documents": 440, "b_documents": 3, "pairs": 440}
    listed = [hit for hit in reports[0]["hits"] if (hit["b"], hit["kind"]) == (reports[0]["hits"][0]["b"], Kind.TEXT)]
    assert len(listed) == LISTED


def test_exit_codes_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = captions(tmp_path / "a", [(encoded(seed=1, size=(64, 48)), "red"), (encoded(seed=2, size=(64, 48)), " ")])
    b = captions(tmp_path / "b", [(encoded(seed=3, size=(64, 48)), "blue")])
    code, report = report_of(a, b, tmp_path / "report.json")
    assert code == 0 and report["hits"] == []
    assert report["a"] == {"data": a, "documents": 1, "images": 1, "rejected": 1, "unhashed": 0}
    assert "0 documents of B (0.0%) overlap with A" in capsys.readouterr().out
    code, report = report_of(b, b, tmp_path / "report.json")
    assert code == 1 and report["b"]["overlapping"] == 1
    assert {(hit["kind"], hit["distance"]) for hit in report["hits"]} == {
        (kind, 0) for kind in Kind if kind != Kind.TEXT_RUN
    }


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = texts(tmp_path / "a.txt", ["red"])
    for arguments, says in (
        ([a, f"text:{tmp_path / 'nowhere'}"], "no data set at"),
        ([a, str(tmp_path)], "name the tokenizer"),
        ([a, f"nothing:{tmp_path}"], "unknown data reader"),
        ([a, a, "--text-words", "-1"], "must be at least 0"),
    ):
        assert main(["data", "overlap", *arguments]) == 2
        assert says in capsys.readouterr().err
    shutil.copy(tmp_path / "a.txt", tmp_path / "blank.jsonl")
    assert main(["data", "overlap", a, f"text:{tmp_path / 'blank.jsonl'}", "--num-workers", "1"]) == 2
    assert "has 1 documents" in capsys.readouterr().err


def test_unusable_tokenizer_for_a_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data in"):
        open_data_set(str(tmp_path), tokenizer=small_tokenizer(tmp_path))
