"""WebDataset shards: img2dataset's, hostile ones, damaged ones, and folders prepared for megatron-energon."""

import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.records import Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError
from tests.corpora import encoded

JPEG, PNG = encoded("JPEG"), encoded("PNG")


def write_shard(file: Path, samples: list[dict[str, Any]]) -> None:
    with webdataset.TarWriter(str(file)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:09}"} | sample)


def items_of(path: Path, **options: str) -> list[Document | Rejected]:
    return list(open_reader("webdataset", path, options))


def found(items: list[Document | Rejected]) -> list[object]:
    """The caption of each document and the reason of each rejection."""
    return [item.reason if isinstance(item, Rejected) else item.parts[1].text for item in items]  # type: ignore[union-attr]


def test_an_image_stands_before_its_caption(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "00001.tar",
        [
            {"jpg": JPEG, "txt": "a dog", "json": {"caption": "other", "url": "http://x"}},
            {"png": PNG, "json": {"caption": "a cat"}},
            {"JPG": JPEG, "txt": "an <image> of\nupper case"},
        ],
    )
    first, second, third = items_of(tmp_path)
    assert first == Document((Image(JPEG), Text("a dog")), "00001.tar/000000000")
    assert second == Document((Image(PNG), Text("a cat")), "00001.tar/000000001")
    assert third == Document((Image(JPEG), Text("an <image> of\nupper case")), "00001.tar/000000002")


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c/a.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, [{"jpg": JPEG, "txt": name}])
    assert found(items_of(tmp_path)) == ["a.tar", "b.tar", "c/a.tar"]
    assert [shard.name for shard in open_reader("webdataset", tmp_path).shards()] == ["a.tar", "b.tar", "c/a.tar"]
    assert found(items_of(tmp_path / "b.tar")) == ["b.tar"]


def test_a_caption_is_drawn_by_weight_and_key(tmp_path: Path) -> None:
    sample = {"jpg": JPEG, "txt": "alt", "json": {"vecap": "new", "third": "third"}}
    write_shard(tmp_path / "a.tar", [sample] * 2000)
    captions = "txt=0.6,json:vecap=1.4"
    drawn = found(items_of(tmp_path, captions=captions))
    assert 520 < Counter(drawn)["alt"] < 680  # 600 +- 4 standard deviations
    assert Counter(drawn)["alt"] + Counter(drawn)["new"] == 2000
    assert found(items_of(tmp_path, captions=captions)) == drawn
    assert found(items_of(tmp_path, captions=captions, seed="1")) != drawn


def test_a_missing_caption_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"jpg": JPEG, "txt": "alt", "json": {"vecap": None}}, {"jpg": JPEG, "cls": 1}])
    assert found(items_of(tmp_path, captions="txt=1,json:vecap=1e9")) == ["alt", Reason.INCOMPLETE_SAMPLE]


def test_unusable_samples_are_rejected_with_their_reasons(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"txt": "no image"},
        {"jpg": JPEG},
        {"jpg": b"", "txt": "empty image"},
        {"jpg": JPEG, "txt": b"caf\xe9"},
        {"jpg": JPEG, "txt": b"a\0b"},
        {"jpg": JPEG, "txt": b" \n"},
        {"jpg": JPEG, "json": b"{"},
        {"jpg": JPEG, "json": {"caption": 7}},
        {"__key__": "000000000", "jpg": JPEG, "txt": "key again"},
        {"jpg": JPEG, "txt": "good"},
    ]
    write_shard(tmp_path / "a.tar", samples)
    assert found(items_of(tmp_path)) == [
        Reason.INCOMPLETE_SAMPLE,
        Reason.INCOMPLETE_SAMPLE,
        Reason.INCOMPLETE_SAMPLE,
        Reason.NOT_UTF8,
        Reason.NUL_BYTES,
        Reason.BLANK_TEXT,
        Reason.NOT_JSON,
        Reason.WRONG_FIELDS,
        Reason.DUPLICATE_KEY,
        "good",
    ]


def hostile(file: Path, name: str, **attributes: Any) -> None:
    with tarfile.open(file, "w") as archive:
        for member, data in (("0.jpg", JPEG), ("0.txt", b"first")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(name)
        for attribute, value in attributes.items():
            setattr(info, attribute, value)
        archive.addfile(info)
        for member, data in (("2.jpg", JPEG), ("2.txt", b"last")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("/etc/1.txt", {}),
        ("../1.txt", {}),
        ("a/../../1.txt", {}),
        ("1.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("1.jpg", {"type": tarfile.LNKTYPE, "linkname": "0.jpg"}),
        ("1.jpg", {"type": tarfile.CHRTYPE}),
        ("1.jpg", {"type": tarfile.FIFOTYPE}),
        ("../1", {"type": tarfile.DIRTYPE}),
    ],
)
def test_unsafe_members_are_rejected(tmp_path: Path, name: str, attributes: dict[str, Any]) -> None:
    hostile(tmp_path / "a.tar", name, **attributes)
    assert found(items_of(tmp_path)) == [Reason.UNSAFE_MEMBER, "first", "last"]


def test_folders_and_marks_of_the_archive_are_no_records(tmp_path: Path) -> None:
    hostile(tmp_path / "a.tar", "folder", type=tarfile.DIRTYPE)
    hostile(tmp_path / "b.tar", "__meta__")
    hostile(tmp_path / "c.tar", "README")
    assert found(items_of(tmp_path)) == [
        *("first", "last"),
        *("first", "last"),
        *(Reason.INCOMPLETE_SAMPLE, "first", "last"),
    ]


def test_a_member_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm1.data.readers.tars.MAX_RECORD", len(JPEG) + 10)
    write_shard(tmp_path / "a.tar", [{"jpg": JPEG, "txt": "x" * 11}, {"jpg": JPEG, "txt": "x" * 10}])
    assert found(items_of(tmp_path)) == [Reason.RECORD_TOO_LARGE, "x" * 10]


def damaged(file: Path, case: str) -> bytes:
    """The shard with its second image damaged."""
    data = file.read_bytes()
    with tarfile.open(file) as archive:
        member = archive.getmembers()[2]
    header, content = member.offset, member.offset_data
    match case:
        case "in an image":
            return data[: content + 100]
        case "in a header":
            return data[: header + 100]
        case "between samples":
            return data[:header]
        case _:
            return data[:header] + b"\xff" * 512 + data[header + 512 :]


@pytest.mark.parametrize("case", ["in an image", "in a header", "between samples", "header overwritten"])
def test_the_rest_of_a_damaged_shard_is_one_rejection(tmp_path: Path, case: str) -> None:
    write_shard(tmp_path / "a.tar", [{"jpg": JPEG, "txt": f"caption {number}"} for number in range(3)])
    (tmp_path / "a.tar").write_bytes(damaged(tmp_path / "a.tar", case))
    outcome = found(items_of(tmp_path))
    cut_sample = [Reason.TRUNCATED_FILE] if case == "in an image" else []
    assert outcome == ["caption 0", *cut_sample, Reason.TRUNCATED_FILE]


def test_shards_without_a_record_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    write_shard(tmp_path / "b.tar", [])
    (tmp_path / "c.tar").write_bytes(b"no archive" * 1000)
    assert found(items_of(tmp_path)) == [Reason.EMPTY_FILE, Reason.EMPTY_FILE, Reason.TRUNCATED_FILE]


def test_a_folder_without_shards_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .tar file"):
        items_of(tmp_path)


CAPTIONING = {"image": "jpg,png", "caption": "json[captions][0],txt"}
VQA = {"image": "jpg", "context": "json[question]", "answers": "json[answers]", "answer_weights": "json[weights]"}


def energon_folder(
    folder: Path, samples: list[dict[str, Any]], sample_type: str, field_map: dict[str, str], *, real: bool = True
) -> Path:
    """Four shards, prepared by megatron-energon's own command, or with the files as it writes them.

    Args:
        real: whether the command is used where it is installed; it takes seconds.
    """
    folder.mkdir()
    for number in range(4):
        write_shard(
            folder / f"shard_{number}.tar",
            [{"__key__": f"{number}/{index}"} | sample for index, sample in enumerate(samples)],
        )
    if real and shutil.which("energon"):
        arguments = ["--non-interactive", "--split-ratio", "2,1,1", "--num-workers", "1", "--no-progress"]
        arguments += ["--sample-type", sample_type, "--field-map", json.dumps(field_map)]
        done = subprocess.run(["energon", "prepare", *arguments, folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder
    meta = folder / ".nv-meta"
    meta.mkdir()
    counts = {f"shard_{number}.tar": len(samples) for number in range(4)}
    meta.joinpath(".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    meta.joinpath("split.yaml").write_text(
        "split_parts:\n  train:\n  - shard_{0..1}.tar\n  val:\n  - shard_2.tar\n  test:\n  - shard_3.tar\nexclude: []\n"
    )
    sample_class = f"sample_type:\n  __module__: megatron.energon\n  __class__: {sample_type}\n"
    fields = "".join(f"  {name}: {field}\n" for name, field in field_map.items())
    meta.joinpath("dataset.yaml").write_text(f"{sample_class}field_map:\n{fields}")
    return folder


def test_energon_captions_of_each_split(tmp_path: Path) -> None:
    samples = [{"jpg": JPEG, "json": {"captions": ["one", "other"]}}, {"png": PNG, "txt": "two"}, {"jpg": JPEG}]
    folder = energon_folder(tmp_path / "set", samples, "CaptioningSample", CAPTIONING)
    keys = []
    for split, num_shards in (("train", 2), ("val", 1), ("test", 1)):
        reader = open_reader("energon", folder, {"split": split})
        items = list(reader)
        assert found(items) == ["one", "two", Reason.INCOMPLETE_SAMPLE] * num_shards
        assert items[1].parts[0] == Image(PNG)  # type: ignore[union-attr]
        assert reader.filters is None
        keys += [item.key for item in items]
    assert sorted(keys) == [f"shard_{shard}.tar/{shard}/{index}" for shard in range(4) for index in range(3)]
    with pytest.raises(UserError, match=r"no split 'validation': it has train, val, test"):
        open_reader("energon", folder, {"split": "validation"})


def test_energon_questions_train_the_weightiest_answer(tmp_path: Path) -> None:
    samples = [
        {"jpg": JPEG, "json": {"question": "what?", "answers": ["a dog", "a cat"], "weights": [0.2, 0.8]}},
        {"jpg": JPEG, "json": {"question": "what?", "answers": ["a dog"], "weights": [1, 2]}},
    ]
    folder = energon_folder(tmp_path / "set", samples, "VQASample", VQA)
    document, rejected = open_reader("energon", folder, {"split": "val"})
    assert isinstance(document, Document)
    assert document.parts == (
        Image(JPEG),
        Text("Question: what? Short answer:", trained=False),
        Text(" a cat"),
    )
    assert isinstance(rejected, Rejected)
    assert rejected.reason == Reason.WRONG_FIELDS


def test_energon_interleaved_sequences_name_their_images(tmp_path: Path) -> None:
    samples = [{"0.jpg": JPEG, "json": {"sequence": ["before", "0.jpg", "after", "1.jpg"]}}]
    folder = energon_folder(tmp_path / "set", samples, "InterleavedSample", {"sequence": "json[sequence]"})
    reader = open_reader("energon", folder, {"split": "test"})
    (document,) = reader
    assert isinstance(document, Document)
    assert document.parts == (Text("before"), Image(JPEG), Text("after"), Text("1.jpg"))
    assert reader.filters == InterleavedFilters()


def test_energon_exclusions_and_old_folders(tmp_path: Path) -> None:
    samples = [{"jpg": JPEG, "txt": "one"}, {"jpg": JPEG, "txt": "two"}]
    folder = energon_folder(tmp_path / "set", samples, "CaptioningSample", CAPTIONING, real=False)
    meta = folder / ".nv-meta"
    counts = json.loads(meta.joinpath(".info.json").read_text())
    meta.joinpath(".info.json").unlink()
    meta.joinpath(".info.yaml").write_text(json.dumps(counts))
    meta.joinpath("dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CaptioningWebdataset\nfield_map: {image: jpg, caption: txt}\n"
    )
    meta.joinpath("split.yaml").write_text(
        "split_parts: {train: ['shard_{0..3}.tar']}\nexclude: ['shard_{0..1}.tar', 'shard_2.tar/2/0']\n"
    )
    keys = [item.key for item in open_reader("energon", folder)]
    assert keys == ["shard_2.tar/2/1", "shard_3.tar/3/0", "shard_3.tar/3/1"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset.yaml", "__module__: megatron.energon\n__class__: CrudeWebdataset\n", "reader `webdataset`"),
        ("dataset.yaml", "sample_type: {__class__: OCRSample}\nfield_map: {}\n", "OCRSample are not read"),
        (
            "dataset.yaml",
            "sample_type: {__class__: VQASample}\nsample_loader: sample_loader.py:sample_loader\n",
            "is not run",
        ),
        ("dataset.yaml", "sample_type: {__class__: VQASample}\nfield_map: {image: jpg}\n", "lacks answers, context"),
        ("dataset.yaml", "sample_type: {", "cannot be read"),
        ("split.yaml", "split_parts: {train: [../a.tar]}", "unknown to"),
        ("split.yaml", "split_parts: {train: []}", "has no shards"),
        ("split.yaml", "split_parts: {train: 3}", "no list of names"),
        (".info.json", "[]", "holds no mapping"),
    ],
)
def test_an_energon_folder_that_cannot_be_read_is_a_users_error(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = energon_folder(tmp_path / "set", [{"jpg": JPEG}], "CaptioningSample", CAPTIONING, real=False)
    (folder / ".nv-meta" / file).write_text(content)
    with pytest.raises(UserError, match=message):
        list(open_reader("energon", folder))


def test_a_folder_without_energons_files_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `energon prepare`"):
        open_reader("energon", tmp_path)
