"""A prepared folder gives back what went in, and nothing that is damaged or was made for another tokenizer."""

import hashlib
import json
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from megatron_mm1.data.prepare import prepare, prepare_main
from megatron_mm1.data.records import Document, Image, Text
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_mm1.errors import UserError
from tests.corpora import caption_documents, encoded, page_documents, small_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stored(documents: list[Document], tokenizer: Tokenizer, folder: Path) -> IndexedSource:
    prepare(documents, tokenizer=tokenizer, output=folder)
    return IndexedSource(folder, tokenizer_fingerprint=tokenizer.fingerprint)


def expected(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool], list[bytes]]:
    tokens, trained, images = [tokenizer.bos_id], [False], []
    for part in document.parts:
        if isinstance(part, Image):
            tokens, trained = [*tokens, tokenizer.image_id], [*trained, False]
            images.append(part.data)
        else:
            ids = tokenizer.encode(part.text)
            tokens, trained = tokens + ids, trained + [part.trained] * len(ids)
    texts = [part for part in document.parts if isinstance(part, Text)]
    return [*tokens, tokenizer.eos_id], [*trained, texts[-1].trained if texts else True], images


def test_documents_come_back_as_they_were(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [*caption_documents(5), *page_documents(20), Document((Image(encoded()),), "image alone")]
    source = stored(documents, tokenizer, tmp_path / "data")
    assert len(source) == len(documents)
    for number, document in enumerate(documents):
        piece = source.piece(number)
        tokens, trained, images = expected(document, tokenizer)
        assert (piece.tokens.tolist(), piece.trained.tolist(), list(piece.images)) == (tokens, trained, images)


def test_lengths_count_each_image_at_its_full_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = page_documents(20)
    source = stored(documents, tokenizer, tmp_path / "data")
    for number, document in enumerate(documents):
        tokens, _, images = expected(document, tokenizer)
        assert source.num_images[number] == len(images)
        assert source.lengths(9)[number] == len(tokens) + 8 * len(images)


def test_stretch_of_a_document_holds_its_own_images(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pictures = [encoded(seed=seed) for seed in range(3)]
    document = Document(tuple(part for picture in pictures for part in (Text("red"), Image(picture))), "three")
    source = stored([*caption_documents(2), document], tokenizer, tmp_path / "data")
    whole = source.piece(2)
    for start in range(len(whole.tokens)):
        for stop in range(start, len(whole.tokens) + 1):
            piece = source.piece(2, start, stop)
            assert piece.tokens.tolist() == whole.tokens[start:stop].tolist()
            places = np.flatnonzero(whole.tokens == tokenizer.image_id)
            assert list(piece.images) == [p for p, place in zip(pictures, places, strict=True) if start <= place < stop]


def test_repeated_image_is_stored_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    picture = encoded()
    stored(
        [Document((Image(picture), Text(word)), word) for word in ("red", "blue", "big")], tokenizer, tmp_path / "data"
    )
    assert (tmp_path / "data" / "images.bin").stat().st_size == len(picture)


def test_bad_image_leaves_its_document_out_and_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = [
        Document((Image(data), Text("x")), "bad") for data in (b"junk", encoded("PNG", size=(64, 64))[:100], b"junk")
    ]
    counts = prepare([*bad, *caption_documents(2)], tokenizer=tokenizer, output=tmp_path / "data")
    assert counts["documents"] == counts["images"] == 2
    assert counts["skipped: not an image"] == 2
    assert counts["skipped: image cannot be decoded"] == 1


def test_manifest_has_every_file_and_its_checksum(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored(page_documents(5), tokenizer, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    files = {file.name: file.read_bytes() for file in (tmp_path / "data").iterdir() if file.name != "manifest.json"}
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


def test_source_pickles(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = stored(caption_documents(3), tokenizer, tmp_path / "data")
    content = pickle.dumps(source)
    assert len(content) < 1000
    assert pickle.loads(content).piece(1).tokens.tolist() == source.piece(1).tokens.tolist()


def test_nothing_is_left_after_a_failure(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def failing():
        yield from caption_documents(2)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        prepare(failing(), tokenizer=tokenizer, output=tmp_path / "data")
    with pytest.raises(UserError, match="no usable document"):
        prepare([], tokenizer=tokenizer, output=tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_missing_data_names_the_command(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no prepared data in .*mm1 data prepare"):
        IndexedSource(tmp_path / "nowhere", tokenizer_fingerprint=tokenizer.fingerprint)


def test_wrong_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    train_tokenizer(["another text entirely"] * 20, tmp_path / "other.model", vocab_size=280)
    with pytest.raises(UserError, match="wrong tokenizer"):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=Tokenizer(tmp_path / "other.model").fingerprint)


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "images.bin", "documents.npy", "images.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_file_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, damage: str) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    file = tmp_path / "data" / name
    file.write_bytes(file.read_bytes()[:-1]) if damage == "cut" else file.unlink()
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes instead of \d+"):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=tokenizer.fingerprint)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "files": []}'])
def test_damaged_manifest(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=tokenizer.fingerprint)


def test_same_input_is_prepared_once_and_another_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "a.png").write_bytes(encoded())
    write_jsonl(
        tmp_path / "in" / "captions.jsonl",
        [{"image": "images/a.png", "caption": "red"}, {"image": "b", "caption": "x"}],
    )
    args = Namespace(reader="captions", input=tmp_path / "in", tokenizer=tokenizer.path, output=tmp_path / "out")
    counts = prepare_main(args)
    assert counts["documents"] == 1
    assert counts["skipped: image file missing or unreadable"] == 1
    written = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare_main(args) == counts
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == written
    write_jsonl(tmp_path / "in" / "captions.jsonl", [{"image": "images/a.png", "caption": "a longer text"}])
    with pytest.raises(UserError, match="remove it or choose another output"):
        prepare_main(args)
