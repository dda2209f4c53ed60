"""The demo corpus: how pages become documents, and what the built corpus must hold."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_mm1.data import demo_downloads
from megatron_mm1.data.demo import SPLITS, build_demo_corpus
from megatron_mm1.data.demo_content import caption_of
from megatron_mm1.data.demo_downloads import fetch_packages
from megatron_mm1.data.demo_pages import PageParser, cut_page
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError

PAGE = """<html><head><title>Skipped</title></head><body>
<div class="navheader"><div>Previous</div>Up<img src="prev.png" /></div>
<h2>4.4. Crop &amp; more</h2>
<p>Click <img src="small-icon.png" /> the
   tool.</p><div class="figure"><img src="crop.png" alt="x" /><p>Figure 1</p></div>
<ul><li>one</li><li>two</li></ul>
<div class="navfooter">Next</div></body></html>"""


def test_page_keeps_text_and_wanted_images_in_order() -> None:
    parser = PageParser(keep_image=lambda src: src == "crop.png")
    parser.feed(PAGE)
    parser.flush()
    assert parser.blocks == [
        ("text", "4.4. Crop & more"),
        ("text", "Click the tool."),
        ("image", "crop.png"),
        ("text", "Figure 1"),
        ("text", "one"),
        ("text", "two"),
    ]


@pytest.mark.parametrize(
    ("costs", "expected"), [([3, 3, 4], [[3, 3, 4]]), ([3, 3, 5], [[3, 3], [5]]), ([99, 1], [[99], [1]]), ([], [])]
)
def test_page_is_cut_between_blocks(costs: list[int], expected: list[list[int]]) -> None:
    runs = cut_page([("text", str(cost)) for cost in costs], cost=lambda block: int(block[1]), limit=10)
    assert [[int(text) for _, text in run] for run in runs] == expected


@pytest.mark.parametrize(
    ("emoji", "tones", "caption"),
    [
        (("DOG FACE", "Animals & Nature", "animal-mammal"), None, "animal mammal: dog face"),
        (("Peru Flag", "Flags", "country-flag"), None, "country flag: peru"),
        (
            ("WAVING HAND SIGN", "People & Body", "hand-fingers-open"),
            "1F3FF",
            "hand fingers open: waving hand sign, dark skin tone",
        ),
    ],
)
def test_caption(emoji: tuple[str, str, str], tones: str | None, caption: str) -> None:
    assert caption_of(dict(zip(("name", "category", "subcategory"), emoji, strict=True)), tones) == caption


@pytest.mark.parametrize("tool", ["npm", "apt-get", "dpkg"])
def test_missing_tool_is_named_before_anything_is_written(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_downloads.shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    with pytest.raises(UserError, match=f"needs '{tool}', which is not on PATH"):
        fetch_packages(tmp_path / "downloads")
    assert list(tmp_path.iterdir()) == []


def test_failing_download_says_which_and_how_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_downloads.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"`ls /nowhere/at/all` failed 3 times: .*No such file"):
        demo_downloads._run(["ls", "/nowhere/at/all"], cwd=tmp_path)


def test_download_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"not it")
    with pytest.raises(UserError, match=r"a.tgz: expected SHA-256 00ff, got [0-9a-f]{64}"):
        demo_downloads._verify(tmp_path / "a.tgz", "00ff")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.demo
class TestBuiltCorpus:
    def test_is_complete_and_reused(self, demo_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron_mm1.data.demo.fetch_packages", lambda folder: pytest.fail("downloads again"))
        counts = build_demo_corpus(demo_corpus)["counts"]
        captions = counts["captions"]
        assert captions["train"]["documents"] + captions["validation"]["documents"] >= 7_000
        assert counts["interleaved"]["train"]["documents"] >= 400
        assert counts["questions"]["train"]["documents"] == 38_575
        assert not any(
            key.startswith("skipped") for splits in counts.values() for split in splits.values() for key in split
        )

    def test_opens_with_its_tokenizer_and_fits_the_tiny_preset(self, demo_corpus: Path) -> None:
        tokenizer = open_tokenizer(demo_corpus / "tokenizer.model")
        assert tokenizer.vocab_size == 4096
        for name in ("captions", "questions", "interleaved", "text"):
            for split in SPLITS:
                source = IndexedSource(
                    demo_corpus / "prepared" / name / split, tokenizer_fingerprint=tokenizer.fingerprint
                )
                documents = np.arange(len(source))
                num_images = source.num_images(documents)
                assert (source.num_tokens(documents) + 8 * num_images <= 256).mean() > 0.97, (name, split)
                assert num_images.min() >= (name != "text")

    def test_interleaved_documents_have_no_navigation(self, demo_corpus: Path) -> None:
        for row in rows(demo_corpus / "raw" / "interleaved" / "train" / "documents.jsonl"):
            assert not re.search(r"^(Prev|Next)$", "".join(text or "" for text in row["texts"]), re.MULTILINE)

    def test_held_out_captions_are_what_their_kind_says(self, demo_corpus: Path) -> None:
        train = rows(demo_corpus / "raw" / "captions" / "train" / "captions.jsonl")
        held_out = rows(demo_corpus / "raw" / "captions" / "validation" / "captions.jsonl")
        trained = {(row["concept"], row["style"]) for row in train}
        concepts = {concept for concept, _ in trained}
        for row in held_out:
            assert (row["concept"], row["style"]) not in trained
            assert (row["concept"] in concepts) == (row["kind"] == "heldstyle")
        assert min(Counter(row["kind"] for row in held_out).values()) >= 250
        assert not {row["page"] for row in rows(demo_corpus / "raw/interleaved/train/documents.jsonl")} & {
            row["page"] for row in rows(demo_corpus / "raw/interleaved/validation/documents.jsonl")
        }
