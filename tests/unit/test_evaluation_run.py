"""An evaluation from tasks to files, with a model that is a script: it can only copy from the demonstrations."""

import io
import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from megatron_mm1.config import ParallelConfig
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.validation import validate
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.tokenizer import train_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation import asking
from megatron_mm1.evaluation.asking import Copies
from megatron_mm1.evaluation.fewshot import FewShot
from megatron_mm1.evaluation.in_training import live_evaluation
from megatron_mm1.evaluation.items import Candidate, ImageFile
from megatron_mm1.evaluation.journal import Journal
from megatron_mm1.evaluation.metrics.strings import exact_match
from megatron_mm1.evaluation.plan import Series, plan
from megatron_mm1.evaluation.report import write_report
from megatron_mm1.evaluation.results import ALL, differences, figures
from megatron_mm1.evaluation.runner import _check_resolution, _digest, _folders, run
from megatron_mm1.evaluation.tables import refusals, verdicts
from megatron_mm1.evaluation.template import Stopping
from megatron_mm1.inference.loading import with_grids, with_tiling
from megatron_mm1.inference.requests import Failure, Generation, Score, WholeImage
from tests.new_words import NewWords


class Copycat:
    """Answers as the last demonstration did whose picture is of the query's kind.

    Attributes:
        asked: how often each prompt was given to it.
        die_after: calls; then it raises.
    """

    def __init__(self, *, die_after: int | None = None) -> None:
        self.asked: Counter[tuple] = Counter()
        self.die_after = die_after

    def generate(self, requests):
        if self.die_after is not None:
            if not self.die_after:
                raise KeyboardInterrupt
            self.die_after -= 1
        self.asked.update(tuple(one.prompt) for one in requests)
        return [self._answer(one.prompt) for one in requests]

    def score(self, requests):
        return [Score((-0.5, -float(len(one.continuation)))) for one in requests]

    @staticmethod
    def _answer(prompt) -> Generation | Failure:
        kinds = [_kind(part) for part in prompt if isinstance(part, Image)]
        texts = [part.text for part in prompt if isinstance(part, Text)]
        if len(kinds) > 9:
            return Failure(f"{len(kinds)} images are more than 9")
        answers = [text.rpartition(": ")[2].strip() for text in texts[:-1]]
        same = [answer for kind, answer in zip(kinds, answers, strict=False) if kind == kinds[-1]]
        return Generation(f" {same[-1] if same else 'nothing'}", (), "end")


def _kind(image: Image) -> int:
    return int(np.asarray(PIL.Image.open(io.BytesIO(image.data))).mean(axis=(0, 1)).argmax())


@pytest.fixture
def task(tmp_path) -> NewWords:
    return NewWords(tmp_path)


def results_of(task, *, series=Series((0, 2, 8), with_control=True), responder=None, journal=None, limit=None):  # noqa: B008
    return run(responder or Copycat(), plan({"words": task}, series, limit=limit), journal=journal)


def test_the_answers_come_from_the_demonstrations_and_their_images(task):
    """Nothing is right without demonstrations, nearly all with eight of three kinds, chance without their images."""
    by_way = {(one.settings.shots, one.is_control): one for one in results_of(task)}
    assert list(by_way) == [(0, False), (2, False), (2, True), (8, False), (8, True)]
    means = {way: figures(one.measured)[ALL]["exact_match"].mean for way, one in by_way.items()}
    assert means[0, False] == 0
    assert 0.3 < means[2, False] < 0.8  # the query's kind is among two demonstrations in 5 of 9 cases
    assert means[8, False] > 0.9
    assert means[8, True] < 0.6
    lost = differences(by_way[8, False], by_way[8, True])["exact_match"]
    assert lost.mean == pytest.approx(means[8, False] - means[8, True])
    assert lost.low > 0.2
    assert [line.endswith("the model uses them.") for line in verdicts(list(by_way.values()))][-1]


def test_a_control_differs_in_the_places_of_images_only(task):
    own, control = plan({"words": task}, Series((4,), with_control=True))
    for (item, one), (_, other) in zip(own.asked, control.asked, strict=True):
        images = [[part for part in made.prompt if isinstance(part, ImageFile)] for made in (one, other)]
        assert [part for part in one.prompt if isinstance(part, Text)] == [
            part for part in other.prompt if isinstance(part, Text)
        ]
        assert sorted(images[0], key=str) == sorted(images[1], key=str)
        assert all(mine != theirs for mine, theirs in zip(images[0][:-1], images[1][:-1], strict=True))
        assert images[0][-1] == images[1][-1] == item.images[0]
        assert item.images[0] not in images[0][:-1]


@pytest.mark.parametrize(
    ("arguments", "origin"),
    [
        (["--recipe", "sft"], "the template of this program"),
        (["--evaluation.chat", "true"], "the template of this program"),
        (["--evaluation.chat_template", "{file}"], "{file}"),
        (["--recipe", "sft", "--evaluation.chat", "false"], None),
        ([], None),
    ],
)
def test_a_training_model_is_asked_in_the_template_that_is_named(tmp_path, arguments, origin):
    """That of its tokenizer, or one's own."""
    file, tokenizer = tmp_path / "own.jinja", tmp_path / "tokenizer.model"
    file.write_text(
        "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"
    )
    train_tokenizer(["what is it? Short answer:"] * 20, tokenizer, vocab_size=300)
    task = "tests.new_words.NewWords"
    settings = {
        "data.tokenizer": tokenizer,
        "evaluation.interval": 1,
        "evaluation.tasks": f"[{task}]",
        "evaluation.data": json.dumps({task: str(tmp_path)}),
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    options += [text.format(file=file) for text in arguments]
    chat = live_evaluation(load_config(["--preset", "mm1-tiny", *options])).chat
    assert (chat and chat.origin) == (origin and origin.format(file=file))


def test_a_control_needs_two_images():
    with pytest.raises(UserError, match="2 shots or more"):
        Series((0, 1), with_control=True)
    assert [way.permute_images for way in Series((0, 1, 2), with_control=True).ways()] == [False, False, False, True]


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_an_interrupted_evaluation_goes_on(task, tmp_path, calls):
    """It leaves the same files, byte for byte, and asks nothing twice."""
    first, second, whole = Copycat(die_after=calls), Copycat(), Copycat()
    journal = Journal(tmp_path / "finished", model="m")
    with pytest.raises(KeyboardInterrupt):
        results_of(task, responder=first, journal=journal)
    for name, responder, noted in (("resumed", second, journal), ("whole", whole, None)):
        results = results_of(task, responder=responder, journal=noted)
        description = {"checkpoint": {}, "few_shot": {}, "limit": None}
        write_report(tmp_path / name, description, results, name="m", with_images=True)
    for file in ("results.json", "items.jsonl", "report.html", "report.md"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert first.asked + second.asked == whole.asked
    assert bool(first.asked) == bool(calls)


def test_a_line_cut_short_is_asked_again(task, tmp_path):
    journal = Journal(tmp_path / "finished", model="m")
    expected = results_of(task, journal=journal)
    [file] = (tmp_path / "finished").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    again = Copycat()
    assert results_of(task, responder=again, journal=journal) == expected
    assert sum(again.asked.values()) == sum(len(json.loads(line)["outcomes"]) for line in lines[3:])
    silent = Copycat()
    assert results_of(task, responder=silent, journal=journal) == expected
    assert not silent.asked


def test_only_the_last_demonstrations_are_shown_large(task):
    sizes = Counter()

    class Looker(Copycat):
        def generate(self, requests):
            for one in requests:
                images = [part for part in one.prompt if isinstance(part, Image)]
                sizes.update([tuple(getattr(image, "image_size", None) for image in images)])
            return super().generate(requests)

    settings = FewShot(high_resolution=96, high_resolution_shots=1)
    results_of(task, series=Series((0, 3), settings=settings), responder=Looker(), limit=5)
    assert sizes == {(96,): 5, (None, None, 96, 96): 5}


def test_a_model_can_be_asked_with_more_tiles_than_it_was_trained_with():
    config = preset("mm1-tiny")
    config = replace(config, data=replace(config.data, image_tiling="dynamic", min_image_tiles=4, max_image_tiles=9))
    asked = with_grids(config, max_image_tiles=16).data
    assert (asked.min_image_tiles, asked.max_image_tiles, asked.max_images_per_sequence) == (4, 16, 17)
    assert with_grids(config, max_image_tiles=2).data.min_image_tiles == 2
    known = {"digest": "d", "tokenizer": "t", "code_version": "1"}
    digests = {_digest(known, {"tp": 1}, max_image_tiles=tiles) for tiles in (None, 9, 16)}
    assert len(digests) == 3  # what was asked with other tiles is asked anew
    template = Namespace(source="template")
    assert _digest(known, {"tp": 1}, chat=template) != _digest(known, {"tp": 1})
    with pytest.raises(UserError, match="only dynamic grids have more or fewer tiles"):
        with_grids(preset("mm1-tiny"), max_image_tiles=16)


@pytest.mark.parametrize("kind", ["none", "overview_and_crops", "dynamic"])
@pytest.mark.parametrize("trained", ["none", "dynamic"])
def test_a_model_can_be_asked_with_another_tiling(kind, trained):
    config = preset("mm1-tiny")
    indicators = trained == "dynamic"
    config = replace(
        config,
        data=replace(config.data, image_tiling=trained, tile_indicators=indicators, max_images_per_sequence=2),
    )
    asked = with_tiling(config, kind)
    assert asked.data.image_tiling == kind
    validate(replace(asked, parallel=ParallelConfig()), world_size=1)


def test_only_the_last_demonstrations_are_cut_into_tiles(task):
    seen = Counter()

    class Looker(Copycat):
        def generate(self, requests):
            for one in requests:
                seen.update([tuple(type(part) for part in one.prompt if isinstance(part, Image))])
            return super().generate(requests)

    settings = FewShot(high_resolution_shots=1)
    results_of(task, series=Series((0, 3), settings=settings), responder=Looker(), limit=5)
    assert seen == {(Image,): 5, (WholeImage, WholeImage, Image, Image): 5}
    _check_resolution(settings, "overview_and_crops")
    _check_resolution(replace(settings, high_resolution=96), "none")
    with pytest.raises(UserError, match="cuts no images into tiles, so say how many px"):
        _check_resolution(settings, "none")


def test_tiles_that_no_sequence_of_the_model_has_room_for_are_refused():
    config = preset("llava15-7b")  # 576 tokens a tile
    config = replace(config, data=replace(config.data, seq_length=2048))
    with pytest.raises(UserError, match="image tiling overview_and_crops: 5 tiles of 576 tokens do not fit the 2048"):
        with_tiling(config, "overview_and_crops")
    tiled = replace(config, data=replace(config.data, image_tiling="dynamic"))
    with pytest.raises(UserError, match="max_image_tiles 3: 4 tiles of 576 tokens"):
        with_grids(tiled, max_image_tiles=3)
    assert with_grids(tiled, max_image_tiles=2).data.max_images_per_sequence >= 3


@pytest.mark.parametrize("change", ["model", "limit", "seed", "resolution", "stopping"])
def test_what_was_asked_otherwise_is_asked_anew(task, tmp_path, change):
    series = Series((2,))
    results_of(task, series=series, journal=Journal(tmp_path / "finished", model="m"), limit=20)
    if change == "seed":
        series = replace(series, settings=replace(series.settings, seed=1))
    if change == "resolution":
        series = replace(series, settings=replace(series.settings, high_resolution=96))
    if change == "stopping":
        task.stopping = replace(task.stopping, max_new_tokens=5)
    responder = Copycat()
    journal = Journal(tmp_path / "finished", model="other" if change == "model" else "m")
    results_of(task, series=series, responder=responder, journal=journal, limit=21 if change == "limit" else 20)
    assert sum(responder.asked.values()) == (21 if change == "limit" else 20)


def test_copies_share_the_work(task, tmp_path, monkeypatch):
    """Each does its part of the chunks; here one after the other, through the journal."""
    monkeypatch.setattr(asking, "_CHUNK", 8)
    conditions = plan({"words": task}, Series((0, 4)))
    journal, responders = Journal(tmp_path / "finished", model="m"), [Copycat(), Copycat(), Copycat()]
    for index, responder in enumerate(responders[:2]):
        with pytest.raises(KeyError):  # the other's part is not there
            asking.ask(responder, conditions, copies=Copies(2, index), journal=None)
        asked = asking._chunks(conditions)
        assert sum(responder.asked.values()) == sum(
            len(chunk.requests) for number, chunk in enumerate(asked) if number % 2 == index
        )
    alone = asking.ask(responders[2], conditions, copies=asking.ONE_COPY, journal=journal)
    assert responders[0].asked + responders[1].asked == responders[2].asked
    assert [len(outcomes) for outcomes in alone] == [40, 40]


def test_bad_items_are_counted_and_others_are_not_affected(task, tmp_path):
    """A query whose image is gone, one whose image is damaged, and one with more images than fit."""
    whole = results_of(task, series=Series((2,)))
    gone, damaged, crowded = task._items[:3]
    gone.images[0].path.unlink()
    damaged.images[0].path.write_bytes(b"nothing")
    task._items = (gone, damaged, replace(crowded, images=crowded.images * 8), *task._items[3:])
    [result] = results = results_of(task, series=Series((2,)))
    told = {item.key: refusal.message for item, refusal in result.refused}
    assert set(told) == {gone.key, damaged.key, crowded.key}
    assert str(gone.images[0].path) in told[gone.key] and "cannot be read" in told[gone.key]
    assert "not an image" in told[damaged.key]
    assert told[crowded.key] == "10 images are more than 9"
    before = {one.item.key: one.outcome for one in whole[0].measured}
    assert {one.item.key: one.outcome for one in result.measured} == {
        key: outcome for key, outcome in before.items() if key not in told
    }
    write_report(tmp_path / "out", {"checkpoint": {}, "few_shot": {}, "limit": 3}, results, name="m", with_images=True)
    summary = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["words"]["shots"]["2"]
    assert (summary["answered"], summary["refused"]) == (37, 3)
    rows = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert {row["key"]: row["refused"] for row in rows if "refused" in row} == told
    for name in ("report.html", "report.md"):
        page = (tmp_path / "out" / name).read_text()
        assert all(line.split(": ")[0] in page for line in refusals(results))


def test_nothing_to_evaluate_is_one_line(task):
    for one in task._items:
        one.images[0].path.unlink()
    with pytest.raises(UserError, match=r"words, 2 shots: none of 40 items can be answered: image .*cannot be read"):
        results_of(task, series=Series((2,)))
    with pytest.raises(UserError, match=r"words, 30 shots: none of 40 items can be asked: 30 shots, but of 28"):
        task._pool = task._pool[:28]
        plan({"words": task}, Series((30,)))
    task._items = ()
    with pytest.raises(UserError, match="queries: none of 0 items can be used"):
        plan({"words": task}, Series((2,)))


def test_scores_alone_and_images_once_a_request(task, monkeypatch):
    """Without generation nothing is generated; an image shown many times is read once."""
    task.stopping = Stopping(max_new_tokens=0)
    task.measure = lambda items, outcomes: exact_match(items, [str(len(outcome.scores)) for outcome in outcomes])
    task._items = tuple(replace(one, answer="2", candidates=(Candidate("a"), Candidate("bb"))) for one in task._items)
    reads, read = Counter(), ImageFile.read
    monkeypatch.setattr(ImageFile, "read", lambda image: reads.update([image]) or read(image))
    responder = Copycat()
    [result] = results_of(task, series=Series((8,)), responder=responder, limit=20)
    assert not responder.asked
    assert set(reads.values()) == {1}
    assert figures(result.measured)[ALL]["exact_match"].mean == 1
    assert [score.log_likelihood for score in result.measured[0].outcome.scores] == [-1.5, -2.5]


def test_the_page_needs_nothing_else(task, tmp_path):
    """Failures stand first, with images of their demonstrations, and text is not taken for markup."""
    task._items = tuple(replace(one, question="<script>a & b?") for one in task._items)
    results = results_of(task, series=Series((0, 2), with_control=True))
    description = {"checkpoint": {"name": "m"}, "few_shot": {"shots": [0, 2]}, "limit": None}
    write_report(tmp_path, description, results, name="m", with_images=True)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12 * 3
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "<script" not in page and "&lt;script&gt;a &amp; b?" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    marks = [part.split('"')[0] for part in page.split('<article class="')[1:]]
    assert marks == ["wrong"] * 8 + ["right"] * 4
    assert "of exact_match over 40 items" in page
    write_report(tmp_path / "blind", description, results, name="m", with_images=False)
    assert "data:image/jpeg" not in (tmp_path / "blind/report.html").read_text()


@pytest.mark.parametrize(
    ("option", "message"), [("a", "not of the form TASK=DIR"), ("b=d", "add --task b, or leave it out"), ("a=", "form")]
)
def test_folders(option, message):
    assert _folders(["a=x=y"], ["a"]) == {"a": Path("x=y")}
    with pytest.raises(UserError, match=message):
        _folders([option], ["a"])
