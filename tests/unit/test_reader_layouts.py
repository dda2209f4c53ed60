"""Tables of captions, web documents and instruction data as their publishers lay them out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.readers.llava import SYSTEM
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError
from tests.corpora import encoded, write_jsonl

RED, BLUE = encoded("PNG", seed=1), encoded("JPEG", seed=2)
END = Control("</s>", trained=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "00000").mkdir(parents=True)
    (folder / "red.png").write_bytes(RED)
    (folder / "00000" / "blue.jpg").write_bytes(BLUE)
    (tmp_path / "secret.png").write_bytes(RED)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def one(items: Iterable[Document | Rejected]) -> Document:
    (item,) = items
    assert isinstance(item, Document), item
    return item


def reasons(items: Iterable[Document | Rejected]) -> list[Reason | None]:
    return [item.reason if isinstance(item, Rejected) else None for item in items]


class TestParquetCaptions:
    def test_paths_below_the_image_folder(self, tmp_path: Path, images: Path) -> None:
        paths = ["red.png", "00000/blue.jpg", "../secret.png", "link.png", "/etc/passwd", "none.png", None]
        table = {"image_path": paths, "caption": ["c"] * 7, "url": [f"http://x/{path}" for path in paths]}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        options = {"image": "image_path", "images": str(images)}
        items = list(open_reader("parquet-captions", tmp_path / "a.parquet", options))
        assert items[0] == Document((Image(RED, "http://x/red.png"), Text("c")), "a.parquet#0")
        assert reasons(items) == [
            *(None, None),
            *(Reason.OUTSIDE_FOLDER, Reason.OUTSIDE_FOLDER, Reason.OUTSIDE_FOLDER),
            *(Reason.MISSING_IMAGE, Reason.INCOMPLETE_SAMPLE),
        ]

    def test_structs_that_datasets_writes(self, tmp_path: Path) -> None:
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        rows = {"image": [{"bytes": RED, "path": None}, None], "caption": ["red", "none"]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
        document, rejected = open_reader("parquet-captions", tmp_path)
        assert isinstance(document, Document)
        assert document.parts == (Image(RED), Text("red"))
        assert isinstance(rejected, Rejected)
        assert rejected.reason == Reason.INCOMPLETE_SAMPLE

    def test_alternative_captions(self, tmp_path: Path) -> None:
        table = pa.table({"image": [RED] * 300, "caption": ["alt"] * 299 + [None], "vecap": ["new"] * 300})
        pq.write_table(table, tmp_path / "a.parquet")
        items = list(open_reader("parquet-captions", tmp_path, {"captions": "caption=0.5,vecap=0.5"}))
        texts = [item.parts[1].text for item in items if isinstance(item, Document) and isinstance(item.parts[1], Text)]
        assert 115 < texts.count("new") < 185
        assert texts[-1] == "new"


class TestObelics:
    ROW = {  # noqa: RUF012
        "images": [None, "red.png", None, "http://x/blue", "http://x/lost", "none.png"],
        "texts": ["one\n\n", None, " ", None, None, None],
        "metadata": json.dumps([None, {"src": "http://x/red"}, None, None, None, None]),
        "general_metadata": "{}",
    }

    def write(self, tmp_path: Path, kind: str, row: Any = None) -> Path:
        row = self.ROW if row is None else row
        file = tmp_path / "docs" / f"0{kind}"
        file.parent.mkdir()
        if kind == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(file)
        else:
            line = json.dumps(row).encode() + b"\n"
            file.write_bytes(line if kind == ".jsonl" else zstandard.compress(line))
        return file.parent

    @pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".jsonl.zst"])
    def test_reading_order_and_dropped_images(self, tmp_path: Path, images: Path, kind: str) -> None:
        write_jsonl(tmp_path / "index.jsonl", [{"url": "http://x/blue", "path": "00000/blue.jpg"}])
        options = {"images": str(images), "image_index": str(tmp_path / "index.jsonl")}
        reader = open_reader("obelics", self.write(tmp_path, kind), options)
        document = one(reader)
        assert document.parts == (Text("one\n\n"), Image(RED, "http://x/red"), Image(BLUE, "http://x/blue"))
        assert document.dropped_images == (Reason.MISSING_IMAGE, Reason.MISSING_IMAGE)
        assert reader.filters == InterleavedFilters()

    def test_image_structs(self, tmp_path: Path) -> None:
        row = {"images": [{"bytes": RED, "path": "x.png"}, None], "texts": [None, "after"]}
        assert one(open_reader("obelics", self.write(tmp_path, ".parquet", row))).parts == (Image(RED), Text("after"))

    def test_the_index_that_img2dataset_leaves(self, tmp_path: Path, images: Path) -> None:
        index = {
            "url": ["http://x/blue", "http://x/lost"],
            "key": ["blue", "000000001"],
            "status": ["success", "failed_to_download"],
        }
        pq.write_table(pa.table(index), images / "00000.parquet")
        options = {"images": str(images), "image_index": str(images)}
        document = one(open_reader("obelics", self.write(tmp_path, ".jsonl"), options))
        assert Image(BLUE, "http://x/blue") in document.parts
        assert len(document.dropped_images) == 2

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"images": [None], "texts": ["a", "b"]}, Reason.WRONG_FIELDS),
            ({"images": ["red.png"], "texts": ["a"]}, Reason.WRONG_FIELDS),
            ({"images": [None], "texts": [7]}, Reason.WRONG_FIELDS),
            ({"images": ["red.png"], "texts": [None]}, Reason.BLANK_TEXT),
            ({"images": [None], "texts": ["a\0"]}, Reason.NUL_BYTES),
            ({"images": "red.png", "texts": "t"}, Reason.WRONG_FIELDS),
            ([], Reason.WRONG_FIELDS),
        ],
    )
    def test_unusable_documents(self, tmp_path: Path, images: Path, row: Any, reason: Reason) -> None:
        folder = self.write(tmp_path, ".jsonl", row)
        assert reasons(open_reader("obelics", folder, {"images": str(images)})) == [reason]

    def test_an_index_without_images_is_a_users_error(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "index.jsonl", [{"address": "http://x/blue"}])
        folder = self.write(tmp_path, ".jsonl")
        with pytest.raises(UserError, match="lists no image"):
            open_reader("obelics", folder, {"image_index": str(tmp_path / "index.jsonl")})
        with pytest.raises(UserError, match="no image folder"):
            open_reader("obelics", folder, {"images": str(tmp_path / "nowhere")})


class TestMmc4:
    @staticmethod
    def write(tmp_path: Path, infos: Any, sentences: Any = ("One.", "Two.", "", "Four.")) -> Path:
        write_jsonl(tmp_path / "docs.jsonl", [{"text_list": sentences, "image_info": infos, "similarity_matrix": []}])
        return tmp_path / "docs.jsonl"

    @pytest.mark.parametrize("place", ["before", "after"])
    def test_images_stand_at_their_sentences(self, tmp_path: Path, images: Path, place: str) -> None:
        infos = [
            {"image_name": "red.png", "raw_url": "http://x/r", "matched_text_index": 3, "matched_sim": 0.3},
            {"image_name": "00000/blue.jpg", "raw_url": "http://x/b", "matched_text_index": 0, "matched_sim": 0.3},
            {"image_name": "red.png", "matched_text_index": 0},
            {"image_name": "none.png", "matched_text_index": 0},
            {"image_name": "red.png", "matched_text_index": 4},
            {"image_name": "red.png", "matched_text_index": -1},
            {"image_name": "red.png", "matched_text_index": True},
            {"image_name": 7, "matched_text_index": 1},
            "no info",
        ]
        document = one(open_reader("mmc4", self.write(tmp_path, infos), {"images": str(images), "place": place}))
        blue, red, last = Image(BLUE, "http://x/b"), Image(RED), Image(RED, "http://x/r")
        if place == "before":
            assert document.parts == (blue, red, Text("One. Two. "), last, Text("Four."))
        else:
            assert document.parts == (Text("One."), blue, red, Text("Two.  Four."), last)
        assert document.dropped_images == (
            Reason.MISSING_IMAGE,
            *([Reason.IMAGE_PLACE] * 3),
            *([Reason.WRONG_FIELDS] * 2),
        )

    @pytest.mark.parametrize(
        ("sentences", "infos", "reason"),
        [
            (["a", 7], [], Reason.WRONG_FIELDS),
            ("a", [], Reason.WRONG_FIELDS),
            (["a"], {}, Reason.WRONG_FIELDS),
            ([""], [], Reason.BLANK_TEXT),
        ],
    )
    def test_unusable_documents(self, tmp_path: Path, sentences: Any, infos: Any, reason: Reason) -> None:
        assert reasons(open_reader("mmc4", self.write(tmp_path, infos, sentences))) == [reason]


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


class TestLlava:
    def read(self, images: Path, rows: list[Any], **options: str) -> list[Document | Rejected]:
        file = images.parent / "llava.json"
        file.write_text(json.dumps(rows, indent=1))
        return list(open_reader("llava", file, {"images": str(images)} | options))

    def test_the_conversation_of_llava_1_5(self, images: Path) -> None:
        row = {
            "id": "1",
            "image": "red.png",
            "conversations": turns("<image>\nWhat is it?", "A square.", "Which colour? ", "Red."),
        }
        document = one(self.read(images, [row]))
        assert document.parts == (
            Text(f"{SYSTEM} USER: ", trained=False),
            Image(RED),
            Text("\nWhat is it? ASSISTANT:", trained=False),
            Text(" A square."),
            END,
            Text("USER: Which colour? ASSISTANT:", trained=False),
            Text(" Red."),
            END,
        )
        written = "".join(
            part.text if isinstance(part, Text) else "<image>" if isinstance(part, Image) else part.symbol
            for part in document.parts
        )
        assert written == (  # conv_vicuna_v1.get_prompt() of LLaVA
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A square.</s>"
            "USER: Which colour? ASSISTANT: Red.</s>"
        )

    def test_images_in_order_and_in_front(self, images: Path) -> None:
        row = {
            "image": ["red.png", "00000/blue.jpg"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                *turns("First <image> then", "Yes.", "<image>", "No."),
            ],
        }
        assert one(self.read(images, [row])).parts == (
            Text("Be brief. USER: First ", trained=False),
            Image(RED),
            Text(" then ASSISTANT:", trained=False),
            *(Text(" Yes."), END),
            Text("USER: ", trained=False),
            Image(BLUE),
            Text(" ASSISTANT:", trained=False),
            *(Text(" No."), END),
        )
        parts = one(self.read(images, [row], place="front")).parts
        assert parts[:3] == (
            Text("Be brief. USER: ", trained=False),
            Image(RED),
            Text("\nFirst  then ASSISTANT:", trained=False),
        )
        assert parts[5:8] == (Text("USER: ", trained=False), Image(BLUE), Text(" ASSISTANT:", trained=False))

    def test_a_conversation_without_an_image_and_a_mark_in_an_answer(self, images: Path) -> None:
        (items := self.read(images, [{"conversations": turns("Hello", "The mark is <image>.")}]))
        assert one(items).parts[1:] == (Text(" The mark is <image>."), END)

    def test_a_first_turn_of_the_assistant_is_left_out(self, images: Path) -> None:
        conversation = [{"from": "gpt", "value": "Welcome."}, *turns("Hello", "Hi.")]
        assert one(self.read(images, [{"conversations": conversation}])).parts == (
            Text(f"{SYSTEM} USER: Hello ASSISTANT:", trained=False),
            Text(" Hi."),
            END,
        )

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"image": "red.png", "conversations": turns("Hello", "Hi.")}, Reason.IMAGE_MARKS),
            ({"conversations": turns("<image>", "Hi.")}, Reason.IMAGE_MARKS),
            ({"image": "red.png", "conversations": turns("<image><image>", "Hi.")}, Reason.IMAGE_MARKS),
            ({"image": "none.png", "conversations": turns("<image>", "Hi.")}, Reason.MISSING_IMAGE),
            ({"image": "link.png", "conversations": turns("<image>", "Hi.")}, Reason.OUTSIDE_FOLDER),
            ({"image": 7, "conversations": turns("<image>", "Hi.")}, Reason.WRONG_FIELDS),
            ({"image": [None], "conversations": turns("<image>", "Hi.")}, Reason.WRONG_FIELDS),
            ({"conversations": turns("Hello")}, Reason.WRONG_FIELDS),
            ({"conversations": []}, Reason.WRONG_FIELDS),
            ({"conversations": turns("Hello", " ")}, Reason.BLANK_TEXT),
            ({"conversations": [{"from": "robot", "value": "x"}]}, Reason.WRONG_FIELDS),
            ({"conversations": "x"}, Reason.WRONG_FIELDS),
            ("x", Reason.WRONG_FIELDS),
        ],
    )
    def test_unusable_conversations(self, images: Path, row: Any, reason: Reason) -> None:
        good = {"conversations": turns("Hello", "Hi.")}
        assert reasons(self.read(images, [good, row, good])) == [None, reason, None]

    def test_json_lines_and_lists_side_by_side(self, images: Path) -> None:
        row = {"conversations": turns("Hello", "Hi.")}
        write_jsonl(images / "b.jsonl", [row])
        (images / "a.json").write_text(json.dumps([row]))
        keys = [item.key for item in open_reader("llava", images)]
        assert keys == ["a.json#0", "b.jsonl@0"]
