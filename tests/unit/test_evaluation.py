"""Tasks, their figures and what is written: with a stand-in for the model, whose likelihoods and answers are given."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from megatron_mm1.data.readers import question_answer, question_prompt
from megatron_mm1.data.records import Text
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.bootstrap import Interval
from megatron_mm1.evaluation.contact_sheet import Panel, write_contact_sheet
from megatron_mm1.evaluation.fewshot import ZERO_SHOT, FewShot, Request, request
from megatron_mm1.evaluation.items import ImageFile, Item
from megatron_mm1.evaluation.published import MEASURES, PUBLISHED, beside_published
from megatron_mm1.evaluation.results import ALL, MeasuredItem, Result, figures, read_figures, write_results
from megatron_mm1.evaluation.tables import console, figures_table
from megatron_mm1.evaluation.task import Measure, Outcome, build_task
from megatron_mm1.evaluation.tasks.demo import DemoCaptions, DemoQuestions, DemoQuestionsExchanged, question_type
from megatron_mm1.evaluation.template import prompt_text
from megatron_mm1.inference.requests import Score


def png(colour) -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), colour).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def corpus(tmp_path):
    """A corpus of 12 concepts drawn in two styles (the last concept's two captions alike) and 6 questions."""
    for split in ("validation", "train"):
        write_corpus(tmp_path / "raw", split)
    return tmp_path


def write_corpus(raw, split):
    captions, questions = raw / "captions" / split, raw / "questions" / split
    for folder in (captions, questions):
        (folder / "images").mkdir(parents=True)
    rows = []
    for concept in range(12):
        for style in ("twemoji", "noto"):
            name = f"images/{style}-{concept}.png"
            (captions / name).write_bytes(png((20 * concept, len(style), 0)))
            kind = "unseen" if concept < 4 else "heldstyle"
            rows.append({"image": name, "caption": f"thing {min(concept, 10)}", "concept": f"C{concept}", "kind": kind})
    (captions / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (questions / "images/0.png").write_bytes(png("red"))
    answers = ["circle", "red", "yes", "no", "rectangle", "teal"]
    rows = [{"image": "images/0.png", "question": f"what about {a}?", "answer": a} for a in answers]
    (questions / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(*losses: float) -> tuple[Score, ...]:
    """Scores of four tokens with the given losses per token."""
    return tuple(Score((-loss,) * 4) for loss in losses)


def first_measures(task, outcome):
    [measures] = task.measure(task.items().items[:1], [outcome])
    return measures


@pytest.mark.parametrize(
    ("distractors", "right"),
    [
        ([(2.0, 2.0)] * 9, 1.0),
        ([(2.0, 2.0)] * 8 + [(0.1, 0.2)], 1.0),  # likelier, whatever the image
        ([(2.0, 2.0)] * 8 + [(2.0, 2.6)], 0.0),
        ([(2.0, 2.0)] * 8 + [(3.0, 3.5)], 0.0),  # a tie is wrong
        ([(1.0, 1.5)] * 9, 0.0),
        ([(float("nan"), 1.0)] * 9, 0.0),
    ],
)
def test_caption_choice(corpus, distractors, right):
    """Losses of each caption behind the right and the other image; the true one gains 0.5."""
    task = DemoCaptions(corpus)
    losses = [loss for pair in [(1.0, 1.5), *distractors] for loss in pair]
    measures = first_measures(task, Outcome(text="", scores=scores(*losses)))
    assert measures["choice_accuracy"].value == right
    names = ("loss_true_image", "loss_other_image", "loss_gain")
    assert [measures[name] for name in names] == [Measure(1.0), Measure(1.5), Measure(0.5)]


def test_caption_items(corpus):
    items = DemoCaptions(corpus).items().items
    assert sorted(item.key for item in items) == sorted(
        f"images/{s}-{n}.png" for s in ("noto", "twemoji") for n in range(12)
    )
    assert [item.key for item in items] != sorted(item.key for item in items)  # any beginning is a sample
    for item in items:
        captions, images = zip(*((one.text, one.images) for one in item.candidates), strict=True)
        assert captions[::2] == captions[1::2] and captions[0] == item.answer
        assert len(set(captions)) == 10
        assert set(images[::2]) == {None} and len(set(images[1::2])) == 1
        assert images[1] != item.images
        assert item.groups == ("unseen" if item.cluster in ("C0", "C1", "C2", "C3") else "heldstyle",)


def test_concepts_weigh_the_same(corpus):
    file = corpus / "raw/captions/validation/captions.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[1:]))  # one concept is drawn in one style only
    weights = Counter()
    for item in DemoCaptions(corpus).items().items:
        weights[item.cluster] += item.weight
    assert set(weights.values()) == {1.0} and len(weights) == 12


def test_the_other_image_is_of_another_caption(corpus):
    """Concepts 10 and 11 are called the same: each image of one would do for the other."""
    items = DemoCaptions(corpus).items().items
    captions = {item.images: item.answer for item in items}
    assert all(captions[item.candidates[1].images] != item.answer for item in items)


def test_items_are_the_same_every_time(corpus):
    assert DemoCaptions(corpus).items() == DemoCaptions(corpus).items()
    assert DemoQuestions(corpus).items() == DemoQuestions(corpus).items()


def test_question_items_are_asked_as_they_are_trained(corpus):
    task = DemoQuestions(corpus)
    by_answer = {item.answer: item for item in task.items().items}
    assert set(by_answer) == {"circle", "red", "yes", "no", "rectangle", "teal"}
    image, text = task.template(by_answer["red"]).asked(by_answer["red"])
    assert (image.read().data, text) == (png("red"), Text(question_prompt("what about red?")))
    assert by_answer["circle"].groups == ("shape", "shape or colour")
    assert by_answer["no"].groups == ("yes-no",)


def test_exchanged_questions_have_their_answers_and_the_image_of_another(corpus):
    file = corpus / "raw/questions/validation/questions.jsonl"
    others = [file.read_text().replace("images/0.png", f"images/{number}.png") for number in (1, 2)]
    file.write_text(file.read_text() + "".join(others))
    for number in (1, 2):
        (file.parent / f"images/{number}.png").write_bytes(png("blue"))
    own, exchanged = (task(corpus).items().items for task in (DemoQuestions, DemoQuestionsExchanged))
    assert [replace(item, images=()) for item in exchanged] == [replace(item, images=()) for item in own]
    assert Counter(item.images for item in exchanged).keys() == Counter(item.images for item in own).keys()
    assert all(item.images != other.images for item, other in zip(own, exchanged, strict=True))


def test_captions_are_shown_as_they_are_trained(corpus):
    task = DemoCaptions(corpus)
    item = next(item for item in task.items().items if item.cluster == "C3")
    made = request(item, task, FewShot(shots=2), pool=task.demonstrations().items)
    assert [type(part) for part in made.prompt] == [ImageFile, Text, ImageFile, Text, ImageFile]
    assert all(part.text.startswith("thing ") and part.text.endswith("\n") for part in made.prompt[1::2])
    assert "thing 3\n" not in [part.text for part in made.prompt[1::2]]


@pytest.mark.parametrize(("text", "right"), [("red", 1.0), ("blue", 0.0), ("", 0.0), ("red red", 0.0)])
def test_question_accuracy(corpus, text, right):
    task = DemoQuestions(corpus)
    item = next(item for item in task.items().items if item.answer == "red")
    assert question_answer(item.answer).strip() == item.answer
    assert task.measure([item], [Outcome(text=text)]) == [{"accuracy": Measure(right)}]


@pytest.mark.parametrize(
    ("answer", "kind"), [("yes", "yes-no"), ("no", "yes-no"), ("triangle", "shape"), ("teal", "colour")]
)
def test_question_type(answer, kind):
    assert question_type(answer) == kind


def test_missing_corpus(tmp_path):
    with pytest.raises(UserError, match="build it with `mm1 data demo`"):
        DemoCaptions(tmp_path).items()


def test_unknown_task():
    with pytest.raises(UserError, match=r"unknown evaluation task 'demo_caption'.*did you mean 'demo_captions'"):
        build_task("demo_caption")


def test_task_by_class_path(monkeypatch, tmp_path):
    (tmp_path / "their_package.py").write_text("class Task:\n    stopping = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build_task("their_package.Task").stopping == 3
    with pytest.raises(UserError, match="takes no folder"):
        build_task("their_package.Task", tmp_path)


def measured(key, value, *, weight=1.0, item_weight=1.0, groups=("g",), cluster=None) -> MeasuredItem:
    request = Request((ImageFile(Path("a.jpg")), Text("why?")), (), ("d",))
    item = Item(key=key, answer="r", groups=groups, cluster=cluster, weight=item_weight)
    outcome = Outcome(text="o", raw=" o", finish_reason="stop")
    return MeasuredItem(item, request, outcome, {"m": Measure(value, weight=weight)})


def result(*items: MeasuredItem) -> Result:
    return Result("t", "m", ZERO_SHOT, {}, items)


def test_figures_are_weighted_means_by_group():
    items = [
        measured("a", 1.0, weight=3, groups=("x",)),
        measured("b", 5.0, weight=1, groups=("x", "y")),
        measured("c", 0.0, weight=8, item_weight=0.5, groups=()),
    ]
    means = {group: named["m"].mean for group, named in figures(items).items()}
    assert means == {"all": 1.0, "x": 2.0, "y": 5.0}


def test_clusters_are_resampled_together():
    alone = [measured(str(i), i % 2) for i in range(40)]
    halves = [measured(str(i), i % 2, cluster=f"c{i % 2}") for i in range(40)]
    assert figures(alone)["all"]["m"].low > 0.3
    assert (figures(halves)["all"]["m"].low, figures(halves)["all"]["m"].high) == (0.0, 1.0)


def test_results_are_written_and_read_back(tmp_path):
    items = [measured("a", 1.0), measured("b", 0.0)]
    write_results(tmp_path / "out", {"checkpoint": {"iteration": 7}}, [result(*items)])
    assert read_figures(tmp_path / "out") == {"t": figures(items)}
    assert read_figures(tmp_path / "out", shots=4) == {}
    assert json.loads((tmp_path / "out/results.json").read_text())["checkpoint"] == {"iteration": 7}
    rows = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "task": "t",
        "shots": 0,
        "images_exchanged": False,
        "key": "a",
        "groups": ["g"],
        "demonstrations": ["d"],
        "prompt": "<image>why?",
        "images": ["a.jpg"],
        "raw_output": " o",
        "finish_reason": "stop",
        "output": "o",
        "reference": "r",
        "references": [],
        "scores": [],
        "measures": {"m": 1.0},
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items.jsonl", "results.json"]


def test_table_shows_every_figure():
    lines = console(figures_table([result(measured("a", 1.0), measured("b", 1.0))])).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [["t", "0", ALL, "m"], ["t", "0", "g", "m"]]
    assert "1.000 [1.000, 1.000]" in lines[1]


@pytest.mark.parametrize("content", ["", "{}", '{"tasks": {"t": {"all": {"m": {"mean": 1}}}}}', '{"tasks": []}'])
def test_damaged_results(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_figures(tmp_path)


def test_missing_results(tmp_path):
    with pytest.raises(UserError, match="no evaluation in"):
        read_figures(tmp_path)


def test_prompt_text():
    assert prompt_text((Text("see "), ImageFile(Path("a")), Text(" there"))) == "see <image> there"


def test_weightless_measures_are_zero():
    """POPE's F1 where nothing is there and nothing is claimed."""
    interval = figures([measured("a", 0.0, weight=0), measured("b", 0.0, weight=0)])["all"]["m"]
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_published_figures_stand_beside_a_runs():
    own = Interval(mean=0.5, low=0.45, high=0.55, count=10)
    results = {"vqav2": {"accuracy": own}, "coco": {"cider": own}, "docvqa": {"anls": own}}
    assert beside_published(results, shots=8, name="ours") == [
        ["task, 8 shots", "measure", "ours", "MM1-3B", "MM1-7B", "MM1-30B"],
        ["coco", "cider", "50.0 [45.0, 55.0]", "114.6", "116.3", "123.1"],
        ["vqav2", "accuracy", "50.0 [45.0, 55.0]", "63.6", "63.6", "70.9"],
    ]
    [_, reasoned] = beside_published({"mathvista": {"accuracy": own}}, shots=8, name="ours")
    assert reasoned[-1] == "44.4 (chain of thought, mixed resolution)"
    assert beside_published(results, shots=4, name="ours")[0] == ["task, 4 shots", "measure", "ours"]
    assert {one.task for one in PUBLISHED} == set(MEASURES)


def test_contact_sheet_shows_the_images(tmp_path):
    colours = [(200, 30, 60), (10, 120, 240)]
    panels = [Panel(png(colour), question="", output="a $ sign, a\nline", reference="b") for colour in colours]
    write_contact_sheet(tmp_path / "sheet.png", [("captions", panels), ("questions", panels[:1])])
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        shown = dict((colour, count) for count, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 20))
        assert sheet.width <= 1400
    assert shown[colours[0]] == pytest.approx(2 * shown[colours[1]], rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
