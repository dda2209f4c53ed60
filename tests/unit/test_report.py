"""`mm1 report`: one page, which needs nothing else, of what a run has written; a real run's is tests/parallel's."""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import PIL.Image
import pytest

from megatron_mm1.cli import USER_ERROR, main
from megatron_mm1.config.presets import preset
from megatron_mm1.config.serialization import to_yaml
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import ImageFile
from megatron_mm1.report import sections
from megatron_mm1.report.charts import chart
from megatron_mm1.report.log import RunLog, read_log
from megatron_mm1.report.page import run_page

NASTY = "cap<b>$x$"


def train_record(step: int, **figures: float | None) -> dict[str, Any]:
    return {
        "kind": "train",
        "iteration": step,
        "lm_loss": 9.0 - step / 100,
        f"loss {NASTY}": 3.0,
        "grad_norm": 1.0,
        "grad_norm tower": 0.5,
        "tokens_per_second": 2000.5,
        "tflops_per_gpu": 0.01,
        "learning_rate": 1e-3,
        "learning_rate tower": 5e-4,
        "data_wait_ms": 3.25,
        "skipped_iterations": 2,
        "nan_iterations": 0,
        **figures,
    }


def validation_record(step: int, own: float, other: float) -> dict[str, Any]:
    return {"kind": "validation", "iteration": step, NASTY: own, f"{NASTY}, images exchanged": other, "text": 6.0}


def moe(block: int, modality: str, load: float) -> dict[str, float]:
    name = f"moe block {block} {modality}"
    return {f"{name} load": load, f"{name} drop rate": 0.25, f"{name} entropy": 1.0}


def write_run(folder: Path, records: list[dict[str, Any]], items: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(to_yaml(preset("mm1-tiny")))
    if items is not None:
        (folder / "eval").mkdir()
        (folder / "eval" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def item(**fields: Any) -> dict[str, Any]:
    return {
        "task": "captions",
        "shots": 0,
        "images_exchanged": False,
        "prompt": "<image>Which <b>shape</b>?",
        "images": [],
        "output": "a circle",
        "reference": "a square",
        "measures": {"exact_match": 0.0},
        **fields,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that logged everything: drawing its plots takes seconds."""
    folder = tmp_path_factory.mktemp("whole")
    red = folder / "red.png"
    PIL.Image.new("RGB", (300, 200), (250, 5, 5)).save(red)
    records = [
        validation_record(0, 8.0, 8.0),
        train_record(10, **moe(1, "text", 1.0), **moe(3, "text", 3.0), **moe(1, "image", 2.0)),
        {"kind": "memory", "iteration": 10, "planned 0": 1.0625, "measured 0": 1.25},
        train_record(20),
        validation_record(20, 1.5, 2.25),
        {"kind": "evaluation", "iteration": 20, "demo 0 shots, accuracy": 0.5, "demo 0 shots, not answered": 3},
    ]
    items = [item(images=[str(red)]), item(task="other", images=[str(red.with_name("gone.png"))])]
    run = write_run(folder / "run", records, items)
    return run_page(run, output=run / "report.html")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one validation and one sample."""
    return write_run(tmp_path / "run", [validation_record(20, 1.5, 2.25)], [item()])


class Page(HTMLParser):
    """Elements with their attributes, text, and the elements that were left open."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def pictures(self, kind: str) -> Iterator[bytes]:
        for tag, attributes in self.elements:
            source = attributes.get("src") or ""
            if tag == "img" and source.startswith(f"data:{kind};base64,"):
                yield base64.b64decode(source.partition(",")[2])


def page_of(run: Path) -> Page:
    return Page(run_page(run, output=run / "report.html"))


def test_a_page_needs_nothing_else(whole: str) -> None:
    assert not re.search(r"https?://(?!www.w3.org)|<script|<link|url\(", whole)
    page = Page(whole)
    assert page.open == []
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in page.elements)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements


def test_a_page_has_every_part(whole: str) -> None:
    page = Page(whole)
    titles = ("Loss", "Loss by source", "Gradient norm", "Throughput", "Validation", "Experts", "Memory of a rank")
    assert all(f"{title} " in page.text for title in titles)
    assert "Evaluation while training" in page.text
    assert "step 20 of 700" in page.text
    plots = [ElementTree.fromstring(plot) for plot in page.pictures("image/svg+xml")]
    assert len(plots) == 6 + 1 + 3 + 1
    words = [" ".join(plot.itertext()) for plot in plots]
    assert any(NASTY in text for text in words), "a source's name is text, not mathematics or markup"


def test_what_was_not_logged_is_said(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", [{"kind": "straggler", "iteration": 3, "rank": 1}]))
    assert "No training step was logged." in page.text
    assert "No validation was logged." in page.text
    assert not any(word in page.text for word in ("Experts", "Memory of a rank", "Samples"))


def test_the_validation_says_what_the_right_image_is_worth(run: Path) -> None:
    rows = Page(sections.validation(read_log(run))).text
    assert re.search(r"1\.5\s+2\.25\s+0\.7500", rows)
    assert re.search(r"text\s+6\s", rows)


def test_experts_are_means_over_blocks() -> None:
    records = {"train": {5: moe(1, "text", 1.0) | moe(3, "text", 3.0) | moe(1, "image", 2.0)}}
    log = RunLog(records, 0)
    assert sections._over_blocks(log, "text", "load") == {5: 2.0}
    assert sections._over_blocks(log, "image", "load") == {5: 2.0}
    assert re.search(r"1\s+1\s+2\s+3\s+3\s", Page(sections.experts(log)).text)


def test_equal_learning_rates_are_one_line_with_all_their_names(tmp_path: Path) -> None:
    rates = {"learning_rate tower": 1e-3, "learning_rate connector": 8e-5}
    page = page_of(write_run(tmp_path / "run", [train_record(step, **rates) for step in (10, 20)]))
    *_, plot = page.pictures("image/svg+xml")
    words = list(ElementTree.fromstring(plot).itertext())
    assert "decoder, tower" in words and "connector" in words


def test_exchanged_images_are_a_dashed_line_of_the_same_colour() -> None:
    lines = {"a": {0: 1.0, 10: 2.0}, "b": {0: 3.0, 10: 4.0}}
    dashed = [
        path.attrib["style"]
        for path in ElementTree.fromstring(chart(lines, unit="x", dashed={"b": {0: 5.0, 10: 6.0}})).iter()
        if "stroke-dasharray" in path.attrib.get("style", "")
    ]
    assert len(dashed) == 1
    assert "#b35900" in dashed[0]
    assert chart(lines, unit="x") == chart(lines, unit="x")


def test_a_step_taken_again_counts_as_it_was_the_last_time(tmp_path: Path) -> None:
    records = [train_record(10), train_record(20), train_record(10, lm_loss=1.0), train_record(20, lm_loss=None)]
    log = read_log(write_run(tmp_path / "run", records))
    assert log.line("train", "lm_loss") == {10: 1.0}


def test_a_line_that_is_being_written_is_passed_over(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "iterat')
    assert read_log(run).unreadable == 1
    assert "1 lines of the log could not be read" in page_of(run).text


def test_samples_have_their_images(whole: str) -> None:
    page = Page(whole)
    (content,) = page.pictures("image/jpeg")
    with PIL.Image.open(io.BytesIO(content)) as shown:
        assert max(shown.size) == 128
        assert all(abs(got - value) < 12 for got, value in zip(shown.getpixel((50, 40)), (250, 5, 5), strict=True))
    assert "gone.png is gone" in page.text
    assert "Which <b>shape</b>?" in page.text
    assert "a circle" in page.text and "a square" in page.text
    assert ("article", {"class": "wrong"}) in page.elements


def test_samples_are_the_first_with_the_fewest_demonstrations(tmp_path: Path) -> None:
    items = [item(shots=4, output="four"), item(images_exchanged=True, output="exchanged"), item(output="zero")]
    items += [{"task": "captions", "shots": 0, "images_exchanged": False, "key": "k", "refused": "too long"}]
    items += [item(output=f"number {number}") for number in range(20)]
    text = page_of(write_run(tmp_path / "run", [train_record(1)], items)).text
    assert "zero" in text and "number 10" in text
    assert not any(word in text for word in ("four", "exchanged ", "too long", "number 11"))


def test_an_evaluation_s_own_report_is_linked_from_where_the_page_is(run: Path, tmp_path: Path) -> None:
    (run / "eval" / "report.html").write_text("")
    assert '<a href="eval/report.html">' in run_page(run, output=run / "report.html")
    assert '<a href="run/eval/report.html">' in run_page(run, output=tmp_path / "other.html")


@pytest.mark.parametrize("image", [ImageFile(Path("a, b/c.png")), ImageFile(Path("t.parquet"), 3, "image")])
def test_places_of_images_are_read_back(image: ImageFile) -> None:
    assert ImageFile.parse(str(image)) == image


def test_a_damaged_evaluation_is_named(run: Path) -> None:
    (run / "eval" / "items.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(UserError, match=r"items.jsonl, line 2, is damaged"):
        run_page(run, output=run / "report.html")


def test_an_evaluation_that_is_still_running_shows_what_it_has(run: Path) -> None:
    items = run / "eval" / "items.jsonl"
    before = run_page(run, output=run / "report.html")
    items.write_bytes(items.read_bytes() + '{"task": "é'.encode()[:-1])
    assert run_page(run, output=run / "report.html") == before


def test_the_command_writes_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == run_page(run, output=run / "report.html")


def test_a_run_of_another_version_is_shown_without_its_settings(run: Path) -> None:
    (run / "config.yaml").write_text("name: x\nno_such_key: 1\n")
    assert "its config.yaml cannot be read" in page_of(run).text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none"], "is no run"),
        (["{tmp}/empty"], "is empty"),
        (["{run}", "--output", "{run}/log.jsonl/x.html"], "cannot write"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "empty", [])
    assert main(["report", *(word.format(tmp=tmp_path, run=run) for word in arguments)]) == USER_ERROR
    assert words in capsys.readouterr().err
