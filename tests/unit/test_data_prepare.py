"""A prepared folder gives back what went in, and nothing that is damaged or was made for another tokenizer."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.prepared import PART_FILES, Manifest
from megatron_mm1.data.preparing import Checks
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from megatron_mm1.errors import UserError
from tests.corpora import caption_documents, encoded, page_documents, small_tokenizer


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
            assert isinstance(part, Text)
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
        assert source.key(number) == document.key
        assert piece.sizes == ((12, 20),) * len(images)


def test_lengths_and_images_of_any_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = page_documents(20)
    source = stored(documents, tokenizer, tmp_path / "data")
    chosen = np.array([3, 19, 0, 3])
    tokens = [expected(documents[number], tokenizer)[0] for number in chosen]
    assert source.num_tokens(chosen).tolist() == [len(ids) for ids in tokens]
    places = [[place for place, token in enumerate(ids) if token == tokenizer.image_id] for ids in tokens]
    assert source.num_images(chosen).tolist() == [len(each) for each in places]
    positions, sizes = source.images_of(chosen)
    assert positions.tolist() == [place for each in places for place in each]
    assert sizes.tolist() == [[12, 20]] * len(positions)


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


def test_many_pieces_at_once_are_those_one_by_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = stored(page_documents(20), tokenizer, tmp_path / "data")
    wanted = [(7, 0, 12), (3, 5, 20), (7, 2, 3), (19, 0, 0)]
    for piece, (document, start, stop) in zip(source.pieces(wanted), wanted, strict=True):
        alone = source.piece(document, start, stop)
        assert piece.tokens.tolist() == alone.tokens.tolist()
        assert piece.images == alone.images


def test_control_symbols_take_their_ids_and_end_the_document_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = (Text("red", trained=False), Text("blue"), Control("</s>", trained=True))
    piece = stored([Document(parts, "chat")], tokenizer, tmp_path / "data").piece(0)
    red, blue = tokenizer.encode("red"), tokenizer.encode("blue")
    assert piece.tokens.tolist() == [tokenizer.bos_id, *red, *blue, tokenizer.eos_id]
    assert piece.trained.tolist() == [False, *[False] * len(red), *[True] * len(blue), True]


def test_text_that_spells_a_symbol_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    piece = stored([Document((Text("<image> </s> <s>"),), "text")], tokenizer, tmp_path / "data").piece(0)
    assert tokenizer.image_id not in piece.tokens
    assert tokenizer.eos_id not in piece.tokens[:-1]
    assert tokenizer.decode(piece.tokens.tolist()) == "<image> </s> <s>"


def test_repeated_image_is_stored_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    picture = encoded()
    documents = [Document((Image(picture), Text(word)), word) for word in ("red", "blue", "big")]
    stored(documents, tokenizer, tmp_path / "data")
    assert (tmp_path / "data" / "part-00000" / "images.bin").stat().st_size == len(picture)


def test_bytes_that_changed_are_no_image(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = stored(caption_documents(2), tokenizer, tmp_path / "data")
    file = tmp_path / "data" / "part-00000" / "images.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert source.piece(0).images[0] is not None
    assert source.piece(1).images == (None,)


def test_bad_image_rejects_its_pair_and_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = [
        Document((Image(data), Text("x")), "bad") for data in (b"junk", encoded("PNG", size=(64, 64))[:100], b"junk")
    ]
    manifest = prepare([*bad, *caption_documents(2)], tokenizer=tokenizer, output=tmp_path / "data")
    assert manifest.counts["documents"] == manifest.counts["images"] == 2
    rejected = {"not an image": 2, "image cannot be decoded": 1}
    assert manifest.records == {"read": 5, "written": 2, "rejected": rejected}
    lines = (tmp_path / "data" / "part-00000" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [
        "not an image",
        "image cannot be decoded",
        "not an image",
    ]


def test_headers_alone_do_not_show_damage_behind_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cut = Document((Image(encoded("PNG", size=(64, 64))[:100]), Text("x")), "cut")
    manifest = prepare(
        [cut, *caption_documents(1)],
        tokenizer=tokenizer,
        output=tmp_path / "data",
        checks=Checks(image_check="header"),
    )
    assert manifest.records["written"] == 2


def test_bad_image_of_a_page_is_left_out_of_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good, other = encoded(seed=1), encoded(seed=2)
    page = Document((Image(good), Text("red"), Image(b"junk"), Text("blue"), Image(other)), "page")
    hopeless = Document((Image(b"junk"), Text("red"), Image(b"rubbish")), "hopeless")
    manifest = prepare([page, hopeless], tokenizer=tokenizer, output=tmp_path / "data")
    assert manifest.images == {"seen": 3, "written": 2, "dropped": {"not an image": 1}}
    assert manifest.records["rejected"] == {"not an image": 1}
    piece = IndexedSource(tmp_path / "data", tokenizer_fingerprint=None).piece(0)
    assert piece.images == (good, other)


def test_records_the_reader_rejected_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [Rejected("a", Reason.NOT_JSON, "line 3"), *caption_documents(2), Rejected("b", Reason.BLANK_TEXT)]
    manifest = prepare(records, tokenizer=tokenizer, output=tmp_path / "data")
    assert manifest.records == {"read": 4, "written": 2, "rejected": {"blank text": 1, "not JSON": 1}}


def test_filters_leave_out_images_and_pages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    small, large = encoded(seed=1), encoded(size=(150, 120), seed=2)
    pages = [
        Document((Image(small), Text("red"), Image(large)), "mixed"),
        Document((Image(small), Text("red")), "small"),
    ]
    checks = Checks(filters=InterleavedFilters())
    manifest = prepare(pages, tokenizer=tokenizer, output=tmp_path / "data", checks=checks)
    assert manifest.records["rejected"] == {"no images": 1}
    assert manifest.images == {"seen": 2, "written": 1, "dropped": {"image too small": 1}}


def test_images_repeated_over_the_corpus_go(tmp_path: Path, tokenizer: Tokenizer) -> None:
    common, rare = encoded(size=(150, 120), seed=1), [encoded(size=(150, 120), seed=n) for n in range(2, 6)]
    pages = [
        Document((Text("a"), Image(common), Text("red"), Image(picture), Text(f"blue {n}")), f"page {n}")
        for n, picture in enumerate(rare)
    ]
    pages.append(Document((Image(common), Text("alone")), "alone"))
    checks = Checks(filters=InterleavedFilters(max_repeats=4))
    manifest = prepare(pages, tokenizer=tokenizer, output=tmp_path / "data", checks=checks)
    reason = "image repeated over the corpus"
    assert manifest.records == {"read": 5, "written": 4, "rejected": {reason: 1}}
    assert manifest.images == {"seen": 8, "written": 4, "dropped": {reason: 4}}
    source = IndexedSource(tmp_path / "data", tokenizer_fingerprint=None)
    for n, picture in enumerate(rare):
        without = Document((Text("a"), Text("red"), Image(picture), Text(f"blue {n}")), "")
        tokens, trained, images = expected(without, tokenizer)
        piece = source.piece(n)
        assert (piece.tokens.tolist(), piece.trained.tolist(), list(piece.images)) == (tokens, trained, images)
        assert source.key(n) == f"page {n}"
    kept = Checks(filters=InterleavedFilters(max_repeats=5))
    assert prepare(pages, tokenizer=tokenizer, output=tmp_path / "kept", checks=kept).counts["images"] == 9


def test_too_many_bad_records_fail_and_nothing_is_lost(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [*caption_documents(8), Rejected("a", Reason.NOT_JSON), Rejected("b", Reason.NO_IMAGES)]
    arguments = {"tokenizer": tokenizer, "output": tmp_path / "data"}
    with pytest.raises(UserError, match=r"1 of 10 records are bad \(no images: 1, not JSON: 1\), more than .* 0.09"):
        prepare(records, max_bad_fraction=0.09, **arguments)
    assert not (tmp_path / "data").exists()
    (quarantine,) = tmp_path.glob(".data.preparing/part-*/quarantine.jsonl")
    assert len(quarantine.read_text().splitlines()) == 2

    def nothing() -> Iterator[Document]:
        raise AssertionError("the part that is there is not read again")
        yield

    assert prepare(nothing(), max_bad_fraction=0.1, **arguments).records["written"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_manifest_has_every_file_and_its_checksum(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored(page_documents(5), tokenizer, tmp_path / "data")
    manifest = Manifest.from_json((tmp_path / "data" / "manifest.json").read_text(), origin="manifest")
    (part,) = manifest.parts
    files = {name: (tmp_path / "data" / part.name / name).read_bytes() for name in PART_FILES}
    assert part.files == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


def test_megatron_core_reads_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = stored(page_documents(20), tokenizer, tmp_path / "data")
    theirs = IndexedDataset(str(tmp_path / "data" / "part-00000" / "tokens"))
    assert len(theirs) == len(source)
    assert theirs.document_indices.tolist() == list(range(21))
    for number in range(len(source)):
        assert theirs[number].tolist() == source.piece(number).tokens.tolist()


def test_source_pickles(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = stored(caption_documents(3), tokenizer, tmp_path / "data")
    content = pickle.dumps(source)
    assert len(content) < 1000
    assert pickle.loads(content).piece(1).tokens.tolist() == source.piece(1).tokens.tolist()


def test_a_failure_leaves_no_output(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def failing() -> Iterator[Document]:
        yield from caption_documents(2)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        prepare(failing(), tokenizer=tokenizer, output=tmp_path / "data")
    with pytest.raises(UserError, match="no usable document"):
        prepare([], tokenizer=tokenizer, output=tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == [".data.preparing"]


def test_missing_data_names_the_command(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no prepared data in .*mm1 data prepare"):
        IndexedSource(tmp_path / "nowhere", tokenizer_fingerprint=tokenizer.fingerprint)


def test_wrong_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    train_tokenizer(["another text entirely"] * 20, tmp_path / "other.model", vocab_size=290)
    with pytest.raises(UserError, match="wrong tokenizer"):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=open_tokenizer(tmp_path / "other.model").fingerprint)


@pytest.mark.parametrize("name", PART_FILES)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_file_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, damage: str) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    file = tmp_path / "data" / "part-00000" / name
    file.write_bytes(file.read_bytes()[:-1]) if damage == "cut" else file.unlink()
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes instead of \d+"):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=tokenizer.fingerprint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format": 2, "parts": 3}', "damaged"),
        ('{"format": 1, "files": []}', "has data format 1, this version reads 2"),
    ],
)
def test_damaged_manifest(tmp_path: Path, tokenizer: Tokenizer, content: str, message: str) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=tokenizer.fingerprint)


@pytest.mark.parametrize("name", ["documents.npy", "images.npy"])
def test_an_index_with_a_damaged_header_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    stored(caption_documents(2), tokenizer, tmp_path / "data")
    file = tmp_path / "data" / "part-00000" / name
    file.write_bytes(b"?" * 20 + file.read_bytes()[20:])
    with pytest.raises(UserError, match=rf"{name} is damaged: prepare the data again"):
        IndexedSource(tmp_path / "data", tokenizer_fingerprint=tokenizer.fingerprint)


def test_an_input_that_cannot_be_read_is_not_called_a_full_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def failing() -> Iterator[Document]:
        yield from caption_documents(2)
        raise OSError(5, "Input/output error", "shard-7.tar")

    with pytest.raises(UserError, match=r"stopped: .*Input/output error: 'shard-7.tar'"):
        prepare(failing(), tokenizer=tokenizer, output=tmp_path / "data")
