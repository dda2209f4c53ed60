"""Files as they come: large ones in stretches, compressed ones, damaged ones; every row once or rejected."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm1.data.readers import lines as line_files
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.readers import parquet as parquet_files
from megatron_mm1.data.readers.base import Row, Shard
from megatron_mm1.data.readers.json_list import read_list
from megatron_mm1.data.readers.lines import line_shards, read_lines
from megatron_mm1.data.records import Document, Reason, Rejected, Text
from megatron_mm1.errors import UserError

ROWS = [{"text": f"line {number} " + "x" * (number % 50)} for number in range(400)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def outcome(path: Path, **options: str) -> tuple[list[str], list[Reason]]:
    """Texts and reasons that the reader `text` finds."""
    items = list(open_reader("text", path, options))
    texts = [part.text for item in items if isinstance(item, Document) for part in item.parts if isinstance(part, Text)]
    return texts, [item.reason for item in items if isinstance(item, Rejected)]


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=40),
    stretch=st.integers(1, 60),
    last=st.sampled_from([b"", b"\n"]),
)
@settings(max_examples=150, deadline=None)
def test_every_line_is_in_one_stretch(tmp_path_factory, lines: list[bytes], stretch: int, last: bytes) -> None:
    file = tmp_path_factory.mktemp("lines") / "a[1].txt"
    file.write_bytes(b"\n".join(lines) + last)
    shards = line_shards(file, file.name, stretch=stretch)
    rows = [row for shard in shards for row in read_lines(shard)]
    content = file.read_bytes()
    found = [row.value for row in rows if isinstance(row, Row)]
    assert found == [line.rstrip(b"\r") for line in lines if line.strip()]
    for row in rows:
        if isinstance(row, Row):
            assert content[int(row.key.removeprefix("a[1].txt@")) :].startswith(row.value)
    assert sum(shard.size for shard in shards) == len(content)
    assert all(shard.size < 2 * stretch + max(map(len, lines)) + 2 for shard in shards)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_all_kinds_of_file_hold_the_same_text(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    match suffix:
        case ".jsonl":
            file.write_bytes(LINES)
        case ".jsonl.gz":
            file.write_bytes(gzip.compress(LINES))
        case ".jsonl.zst":
            half = len(LINES) // 2
            file.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))  # two frames
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=70)
        case ".txt":
            file.write_text("".join(row["text"] + "\n" for row in ROWS))
    assert outcome(tmp_path) == ([row["text"].rstrip("\n") for row in ROWS], [])


def test_text_of_another_field(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["one", None, "two"], "text": ["x", "y", "z"]}), tmp_path / "a.parquet")
    assert outcome(tmp_path, text_field="content") == (["one", "two"], [Reason.WRONG_FIELDS])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_truncated_archive_ends_with_one_rejection(tmp_path: Path, suffix: str, kept: float) -> None:
    data = gzip.compress(LINES) if suffix == ".jsonl.gz" else zstandard.compress(LINES)
    (tmp_path / f"rows{suffix}").write_bytes(data[: int(len(data) * kept)])
    texts, reasons = outcome(tmp_path)
    assert reasons[-1] == Reason.TRUNCATED_FILE
    assert texts == [row["text"] for row in ROWS[: len(texts)]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_an_empty_file_is_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes({".gz": gzip.compress(b""), ".zst": zstandard.compress(b"")}.get(name[-4:], b""))
    (tmp_path / "b.txt").write_text("text\n")
    assert outcome(tmp_path) == (["text"], [Reason.EMPTY_FILE])


def test_a_line_of_any_length_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "MAX_RECORD", 100)
    monkeypatch.setattr(line_files, "_SKIPPED_AT_ONCE", 7)
    (tmp_path / "a.txt").write_text("one\n" + "x" * 1000 + "\ntwo\n" + "y" * 99 + "\n" + "z" * 1000)
    assert outcome(tmp_path) == (["one", "two", "y" * 99], [Reason.RECORD_TOO_LARGE] * 2)


def test_row_groups_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a[1].parquet", row_group_size=50)
    whole = list(open_reader("text", tmp_path))
    monkeypatch.setattr(parquet_files, "STRETCH", 1500)
    reader = open_reader("text", tmp_path)
    shards = reader.shards()
    assert 2 < len(shards) < 8
    assert list(reader) == whole
    assert isinstance(whole[57], Document)
    assert whole[57].key == "a[1].parquet#57"


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + 200] ^= 1
    file.write_bytes(data)
    items = list(open_reader("text", tmp_path))
    (rejected,) = [item for item in items if isinstance(item, Rejected)]
    assert rejected.reason == Reason.TRUNCATED_FILE
    assert "rows 100 to 199" in rejected.detail
    assert len(items) == 301


@pytest.mark.parametrize("kept", [0, 3, 500])
def test_a_truncated_table_is_counted(tmp_path: Path, kept: int) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:kept])
    assert outcome(tmp_path) == ([], [Reason.TRUNCATED_FILE])


def test_a_text_of_a_table_that_is_not_utf8_costs_its_own_row(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"caf\xe9", b"two"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert outcome(tmp_path) == (["one", "two"], [Reason.NOT_UTF8])


def test_a_table_without_rows_or_without_the_column_is_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "b.parquet")
    assert outcome(tmp_path) == ([], [Reason.EMPTY_FILE, Reason.WRONG_FIELDS])


def items_of(file: Path) -> Iterator[Row | Rejected]:
    return read_list(Shard(file.name, file, file.stat().st_size))


@given(st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_a_json_list_is_read_item_by_item(tmp_path_factory, values: list[object], chunk: int) -> None:
    file = tmp_path_factory.mktemp("list") / "a.json"
    file.write_text(" " + json.dumps(values, indent=chunk, ensure_ascii=False) + "\n\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mm1.data.readers.json_list._CHUNK", chunk)
        rows = list(items_of(file))
    if values:
        assert [row.value for row in rows if isinstance(row, Row)] == values
        assert rows[-1].key == f"a.json#{len(values) - 1}"
    else:
        assert [row.reason for row in rows if isinstance(row, Rejected)] == [Reason.EMPTY_FILE]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", [Reason.EMPTY_FILE]),
        (b"{}", [Reason.NOT_JSON]),
        (b"[1, 2", [1, 2, Reason.TRUNCATED_FILE]),
        (b"[1, 2,", [1, 2, Reason.TRUNCATED_FILE]),
        (b'[1, {"a": ', [1, Reason.TRUNCATED_FILE]),
        (b"[1 2]", [1, Reason.TRUNCATED_FILE]),
        (b"[1] 2", [1, Reason.TRUNCATED_FILE]),
        (b"[" * 100_000, [Reason.NOT_JSON]),
        (b'\xef\xbb\xbf["a\xff"]', ["a\udcff"]),
    ],
)
def test_a_damaged_json_list_ends_with_one_rejection(tmp_path: Path, content: bytes, found: list[object]) -> None:
    (tmp_path / "a.json").write_bytes(content)
    rows = items_of(tmp_path / "a.json")
    assert [row.value if isinstance(row, Row) else row.reason for row in rows] == found


def test_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"b\.txt"):
        outcome(tmp_path)
