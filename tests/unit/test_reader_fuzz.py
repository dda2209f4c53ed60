"""Damaged data sets of every layout: no exception but a user's error, and a sentence for what was lost."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard

from megatron_mm1.data.filters import filter_document
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.records import Document
from megatron_mm1.errors import UserError
from tests.corpora import encoded

JPEG = encoded("JPEG")
NUM_RECORDS = 12
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
JUNK: list[Any] = [None, 7, -1.5, True, "", "x", "\0", "\ud800", "../x", [], [None], {}, {"bytes": None}, 10**400]


@dataclass(frozen=True)
class Layout:
    """A sound data set of NUM_RECORDS records: its reader, the row of a record, and how the rows are written."""

    reader: str
    file: str
    row: Callable[[int], Any]
    write: Callable[[Path, list[Any]], None]


def json_lines(file: Path, rows: list[Any]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(file.suffix, bytes)
    file.write_bytes(compress(data))


def json_list(file: Path, rows: list[Any]) -> None:
    file.write_text(json.dumps(rows))


def parquet(file: Path, rows: list[Any]) -> None:
    fields = [row if isinstance(row, dict) else {} for row in rows]
    names = sorted({name for row in fields for name in row}) or ["none"]
    columns = {name: _column([row.get(name) for row in fields]) for name in names}
    pq.write_table(pa.table(columns), file, row_group_size=5)


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError):  # no one type for all of them
        return pa.array([json.dumps(value, default=repr) for value in values])


def tar(file: Path, rows: list[Any]) -> None:
    with webdataset.TarWriter(str(file)) as writer:
        for number, row in enumerate(rows):
            fields = row if isinstance(row, dict) and row else {"txt": row}  # nothing would leave no record
            encoded_fields = {name: _member(value) for name, value in fields.items()}
            writer.write({"__key__": f"{number:04}"} | encoded_fields)


def _member(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def energon(file: Path, rows: list[Any]) -> None:
    meta = file.parent / ".nv-meta"
    meta.mkdir(exist_ok=True)
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": {file.name: len(rows)}}))
    (meta / "split.yaml").write_text(f"split_parts:\n  train:\n  - {file.name}\nexclude: []\n")
    (meta / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: VQASample\n"
        "field_map:\n  image: jpg\n  context: json[question]\n  answers: json[answers]\n"
    )
    tar(file, rows)


def page(number: int) -> dict[str, Any]:
    return {"images": ["a.jpg", None], "texts": [None, f"text {number}"]}


def sentences(number: int) -> dict[str, Any]:
    info = {"image_name": "a.jpg", "raw_url": "http://x/a.jpg", "matched_text_index": 1, "matched_sim": 0.3}
    return {"text_list": ["One.", f"{number}."], "image_info": [info]}


def text(number: int) -> dict[str, Any]:
    return {"text": f"text {number}"}


LAYOUTS = [
    Layout("captions", "captions.jsonl", lambda n: {"image": "a.jpg", "caption": f"caption {n}"}, json_lines),
    Layout("questions", "questions.jsonl", lambda n: {"image": "a.jpg", "question": "q", "answer": str(n)}, json_lines),
    Layout("interleaved", "documents.jsonl", page, json_lines),
    Layout("text", "a.jsonl", text, json_lines),
    Layout("text", "a.jsonl.gz", text, json_lines),
    Layout("text", "a.jsonl.zst", text, json_lines),
    Layout("text", "a.parquet", text, parquet),
    Layout("webdataset", "a.tar", lambda n: {"jpg": JPEG, "json": {"caption": f"caption {n}"}}, tar),
    Layout("parquet-captions", "a.parquet", lambda n: {"image": JPEG, "caption": f"caption {n}"}, parquet),
    Layout("obelics", "a.jsonl.zst", page, json_lines),
    Layout("obelics", "a.parquet", page, parquet),
    Layout("mmc4", "a.jsonl", sentences, json_lines),
    Layout("llava", "a.json", lambda n: {"id": n, "image": "a.jpg", "conversations": TURNS}, json_list),
    Layout("energon", "a.tar", lambda n: {"jpg": JPEG, "json": {"question": "q", "answers": [f"a{n}"]}}, energon),
]


def mutated_value(value: Any, rng: random.Random) -> Any:
    """`value` with a field or an item, at some depth, deleted, doubled or replaced."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        if rng.random() < 0.3:
            del copy[place]
        elif isinstance(copy, list) and rng.random() < 0.3:
            copy.append(copy[place])
        else:
            copy[place] = mutated_value(value[place], rng)
        return copy
    return rng.choice(JUNK)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` cut off, or with some bytes flipped, overwritten, removed or repeated."""
    if rng.random() < 0.25:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4, 30))):
        start = rng.randrange(len(changed))
        length = rng.choice((1, 1, 8, 512))
        match rng.randrange(4):
            case 0:
                changed[start] ^= 1 << rng.randrange(8)
            case 1:
                changed[start : start + length] = rng.randbytes(len(changed[start : start + length]))
            case 2 if len(changed) > length:
                del changed[start : start + length]
            case _:
                changed[start:start] = changed[start : start + length]
    return bytes(changed)


def damage(layout: Layout, folder: Path, rng: random.Random) -> None:
    """Write the layout's data set with some of its records, or of its bytes, changed."""
    rows = [layout.row(number) for number in range(NUM_RECORDS)]
    file = folder / layout.file
    by_bytes = rng.random() < 0.6
    if not by_bytes:
        for place in rng.sample(range(NUM_RECORDS), rng.randint(1, 4)):
            rows[place] = mutated_value(rows[place], rng)
    layout.write(file, rows)
    if by_bytes:
        broken = file
        if layout.reader == "energon" and rng.random() < 0.3:
            broken = rng.choice(sorted((folder / ".nv-meta").iterdir()))
        broken.write_bytes(mutate_bytes(broken.read_bytes(), rng))


def left_in(file: Path) -> int:
    """Records that a reader must account for: a plain file cut between records does not tell that there were more."""
    data = file.read_bytes()
    if file.suffix == ".jsonl":
        return len([line for line in data.split(b"\n") if line.strip()])
    if file.suffix == ".json":
        try:
            return len(json.loads(data))
        except (ValueError, TypeError):
            pass
    return NUM_RECORDS


def check(layout: Layout, folder: Path) -> int:
    """Read and filter all of it; returns the records (documents and rejections), 0 where it is a user's error."""
    try:
        reader = open_reader(layout.reader, folder)
        items = list(reader)
    except UserError as error:
        assert str(error)
        return 0
    documents = [item for item in items if isinstance(item, Document)]
    assert items
    lost = left_in(folder / layout.file) - len(documents)
    assert lost <= 0 or len(documents) < len(items), f"{lost} records disappeared"
    for item in items:
        item.key.encode()
        if isinstance(item, Document) and reader.filters:
            filter_document(item, reader.filters)
    return len(items)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.reader}-{layout.file}")
def test_sound_files_are_read_whole(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    layout.write(tmp_path / layout.file, [layout.row(number) for number in range(NUM_RECORDS)])
    items = list(open_reader(layout.reader, tmp_path))
    assert len(items) == NUM_RECORDS
    assert all(isinstance(item, Document) and not item.dropped_images for item in items)


def fuzz(tmp_path: Path, *, seeds: range) -> int:
    """Damage each layout by each seed; returns how many records were read."""
    (tmp_path / "a.jpg").write_bytes(JPEG)
    read = 0
    for index, layout in enumerate(LAYOUTS):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "a.jpg").write_bytes(JPEG)
        for seed in seeds:
            damage(layout, folder, random.Random(f"{layout.reader} {layout.file} {seed}"))
            try:
                read += check(layout, folder)
            except Exception as error:
                error.add_note(f"{layout.reader} {layout.file}, seed {seed}")
                raise
    return read


def test_damaged_files(tmp_path: Path) -> None:
    fuzz(tmp_path, seeds=range(15))


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path) -> None:
    assert fuzz(tmp_path, seeds=range(1000, 1400)) >= 5_000
