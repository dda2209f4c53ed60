"""`mm1 data inspect`: its numbers against a plain count, its page against the sequences it shows."""

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megatron_mm1.cli import main
from megatron_mm1.config import MM1Config
from megatron_mm1.config.schema import SourceConfig
from megatron_mm1.data.inspect.mixture import mixture_table, realised_mixture
from megatron_mm1.data.inspect.page import page, random_indices
from megatron_mm1.data.inspect.prepared_data import describe, duplicate_documents, duplicate_images
from megatron_mm1.data.plan import TrainingData, training_data
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.records import Document, Image, Reason, Rejected, Text
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from tests.corpora import caption_documents, encoded, page_documents, small_config, small_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def opened(config: MM1Config) -> tuple[TrainingData, Tokenizer]:
    tokenizer = open_tokenizer(config.data.tokenizer)
    return training_data(config, tokenizer=tokenizer), tokenizer


def test_duplicates_are_those_of_a_plain_count(tmp_path: Path) -> None:
    documents = [*caption_documents(6), *page_documents(12), *caption_documents(3), caption_documents(1)[0]]
    prepare(documents, tokenizer=small_tokenizer(tmp_path), output=tmp_path / "data")
    source = IndexedSource(tmp_path / "data", tokenizer_fingerprint=None)
    pieces = [source.piece(number) for number in range(len(source))]
    images = Counter(image for piece in pieces for image in piece.images)
    whole = Counter((tuple(piece.tokens), piece.images) for piece in pieces)
    assert duplicate_images(source) == images.total() - len(images) > 4
    assert duplicate_documents(source) == whole.total() - len(whole) == 4


def test_description_has_counts_reasons_and_histograms(tmp_path: Path) -> None:
    documents = [*caption_documents(20), Rejected("a", Reason.NOT_JSON)]
    documents.append(Document((Text("red"), Image(encoded(seed=1)), Image(b"junk")), "page"))
    prepare(documents, tokenizer=small_tokenizer(tmp_path), output=tmp_path / "data")
    text = "\n".join(describe(tmp_path / "data"))
    for line in ("documents: 21", "records: 22 read, 21 written", "left out, not JSON: 1", "left out, not an image: 1"):
        assert line in text
    images = text[text.index("images of a document") : text.index("longer side")].splitlines()[1:]
    assert [line.split()[:3] for line in images if line.strip()] == [["<", "2", "21"]]
    assert images[0].endswith(" " + "#" * 40)


@pytest.mark.parametrize("unit", ["sequences", "tokens", "examples"])
@pytest.mark.parametrize("packing", ["single_source", "mixed"])
def test_the_realised_mixture_is_what_the_weights_say(folder: Path, unit: str, packing: str) -> None:
    if (unit, packing) == ("sequences", "mixed"):
        return
    config = small_config(folder, mixture_unit=unit, packing=packing)
    data, _ = opened(config)
    count = len(data.plan.ingredients[0].stream) if packing == "mixed" else 4000
    realised = realised_mixture(config, data, range(count))
    name = {"sequences": "sequences", "tokens": "positions", "examples": "examples"}[unit]
    values = np.array([getattr(of, name) for of in realised], float)
    assert values / values.sum() == pytest.approx([0.6, 0.4], abs=0.02)


def test_realised_positions_are_those_of_the_batches(folder: Path) -> None:
    from megatron_mm1.data.loader import train_batches

    config = small_config(folder)
    data, tokenizer = opened(config)
    realised = realised_mixture(config, data, range(20))
    batches = list(islice(train_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1), 10))
    for number, of in enumerate(realised):
        filled = sum(int(((batch.source_ids == number) & (batch.segment_ids > 0)).sum()) for batch in batches)
        assert of.positions == filled
    assert sum(of.tiles for of in realised) == sum(batch.num_images for batch in batches)


def test_table_has_every_phase_and_the_epochs_of_the_run(folder: Path) -> None:
    from megatron_mm1.config.schema import CurriculumPhase

    config = small_config(folder, curriculum=(CurriculumPhase(step=50, weights={"pages": 1.0}),))
    config = replace(config, training=replace(config.training, train_iters=100))
    data, _ = opened(config)
    lines = mixture_table(config, data, num_sequences=100)
    assert lines[0] == "from step 0, over 100 sequences:"
    second = lines.index("from step 50, over 100 sequences:")
    assert lines[second + 2].split()[:2] == ["captions", "0.0%"]
    assert lines[second + 3].split()[:2] == ["pages", "100.0%"]
    captions = data.plan.used(800)[0] / len(data.plan.ingredients[0].stream)
    assert f"  {'captions':<16} {captions:>9.3f} epochs" in lines


class Shown(HTMLParser):
    """What a reader of the page sees: text by whether it is marked as trained, pictures, and elements by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.trained, self.plain, self.elements = "", "", Counter[str]()
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        if tag not in ("img", "meta"):
            self._open.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        classes = [name for _, name in self._open]
        if "text" in classes:
            if "trained" in classes:
                self.trained += data
            else:
                self.plain += data


def test_page_shows_exactly_what_is_trained(folder: Path) -> None:
    config = small_config(folder)
    data, tokenizer = opened(config)
    indices = random_indices(config, count=6, seed=1)
    shown = Shown(page(config, data, tokenizer, indices))
    symbols = {token: symbol for symbol, token in tokenizer.controls.items()}
    trained = plain = ""
    images = examples = 0
    for index in indices:
        for piece in data.sources.read(data.plan.sequence(index)):
            examples += 1
            images += len(piece.images)
            for place, token in enumerate(piece.tokens.tolist()):
                if token == tokenizer.image_id:
                    continue
                text = symbols.get(token) or tokenizer.decode([token])
                if place and piece.trained[place]:
                    trained += text
                else:
                    plain += text
    assert shown.trained == trained
    assert shown.plain == plain
    assert shown.elements["img"] == images > 0
    assert shown.elements["section"] == examples


def test_hostile_text_stays_text_and_damage_is_shown(folder: Path, tmp_path: Path) -> None:
    config = small_config(folder)
    tokenizer = open_tokenizer(config.data.tokenizer)
    evil = "<script>alert(1)</script><img src=x> & <s>"
    documents = [Document((Image(encoded(seed=9)), Text(evil)), "<b>key</b>")]
    prepare(documents, tokenizer=tokenizer, output=tmp_path / "evil")
    file = tmp_path / "evil" / "part-00000" / "images.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    sources = (SourceConfig(name="<i>", path=str(tmp_path / "evil")),)
    config = replace(config, data=replace(config.data, sources=sources, seq_length=128))
    data, _ = opened(config)
    text = page(config, data, tokenizer, [0])
    shown = Shown(text)
    assert shown.elements["script"] == shown.elements["img"] == shown.elements["b"] == shown.elements["i"] == 0
    assert evil in shown.plain and shown.trained == ""  # not trained, as its image is damaged
    assert "damaged image: its example is not trained" in shown.plain


def test_page_needs_nothing_else(folder: Path) -> None:
    config = small_config(folder)
    text = page(config, *opened(config), [0, 1])
    assert "http" not in text
    assert text.count("src=") == text.count('src="data:image/jpeg;base64,')


def test_page_of_a_blind_run_has_no_images(folder: Path) -> None:
    from megatron_mm1.data.loader import train_batches

    config = small_config(folder, text_only=True)
    data, tokenizer = opened(config)
    shown = Shown(page(config, data, tokenizer, range(8)))
    batches = list(islice(train_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1), 4))
    symbols = {token: symbol for symbol, token in tokenizer.controls.items()}
    labels = Counter(int(label) for batch in batches for label in batch.labels.flatten() if label >= 0)
    characters = sum(count * len(symbols.get(token) or tokenizer.decode([token])) for token, count in labels.items())
    assert shown.elements["img"] == 0
    assert len(shown.trained) == characters
    realised = realised_mixture(config, data, range(8))
    assert sum(of.positions for of in realised) == sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    assert sum(of.tiles for of in realised) == 0


def test_epochs_of_a_mixed_run_are_by_source(folder: Path) -> None:
    config = small_config(folder, packing="mixed", mixture_unit="examples")
    data, _ = opened(config)
    length = len(data.plan.ingredients[0].stream)
    assert data.epochs(2 * length) == pytest.approx({"captions": 3.0, "pages": 2.0})


def test_phases_that_the_run_does_not_come_to_are_left_out(folder: Path) -> None:
    from megatron_mm1.config.schema import CurriculumPhase

    config = small_config(folder, curriculum=(CurriculumPhase(step=50, weights={"pages": 1.0}),))
    config = replace(config, training=replace(config.training, train_iters=4))
    lines = mixture_table(config, opened(config)[0], num_sequences=1000)
    assert [line for line in lines if "sequences:" in line] == ["from step 0, over 32 sequences:"]


def test_document_duplicates_are_found_without_reading_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mm1.data.storage import LocalFolder

    read: list[str] = []
    plain = LocalFolder.read

    def spy(self, ranges):
        read.extend(wanted.name for wanted in ranges)
        return plain(self, ranges)

    monkeypatch.setattr(LocalFolder, "read", spy)
    config = small_config(folder)
    duplicate_documents(IndexedSource(config.data.sources[0].path, tokenizer_fingerprint=None))
    assert {name.rpartition("/")[2] for name in read} == {"tokens.bin"}


def test_mistakes_are_messages(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_mm1.config.serialization import to_yaml

    config = small_config(folder)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    run = ["data", "inspect", "--config", str(tmp_path / "run.yaml"), "--sequences", "5", "--shown", "1"]
    for arguments, message in (
        ([*run, "--output", str(tmp_path / "run.yaml" / "page.html")], "cannot write"),
        ([*run, "--data.sources", "[]"], "data.sources names no training data"),
        ([*run, "--data.packing", "mixed"], "data.mixture_unit"),
        (["data", "inspect", config.data.sources[0].path, "--output", "page.html"], "leave out --output page.html"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_choice_of_sequences_is_over_the_whole_run(folder: Path) -> None:
    config = small_config(folder)
    config = replace(config, training=replace(config.training, train_iters=1000))
    chosen = random_indices(config, count=200, seed=0)
    assert chosen == random_indices(config, count=200, seed=0) != random_indices(config, count=200, seed=1)
    short = replace(config, training=replace(config.training, train_iters=4))
    assert random_indices(short, count=100, seed=0) == list(range(32))
    assert chosen[0] < 800 and 7200 < chosen[-1] < 8000


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(folder)
    assert main(["data", "inspect", config.data.sources[0].path, config.data.sources[1].path]) == 0
    assert capsys.readouterr().out.count("exact duplicates") == 2
    assert main(["data", "inspect", "a", "--preset", "mm1-tiny"]) == 2
    assert "without a configuration" in capsys.readouterr().err
    from megatron_mm1.config.serialization import to_yaml

    (tmp_path / "run.yaml").write_text(to_yaml(config))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--sequences", "50", "--shown", "3"]
    assert main(["data", "inspect", *arguments, "--output", str(tmp_path / "page.html")]) == 0
    assert "page.html: 3 sequences" in capsys.readouterr().out
    assert Shown((tmp_path / "page.html").read_text()).elements["article"] == 3
