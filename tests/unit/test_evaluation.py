"""Tasks, their figures and what is written: with a stand-in for the model, whose likelihoods and answers are given."""

import io
import json
from collections import Counter

import PIL.Image
import pytest

from megatron_mm1.data.readers import question_answer, question_prompt
from megatron_mm1.data.records import Image, Text
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.contact_sheet import Panel, write_contact_sheet
from megatron_mm1.evaluation.demo_tasks import DemoCaptions, DemoQuestions, question_type
from megatron_mm1.evaluation.report import MeasuredItem, figures, read_figures, table, write_results
from megatron_mm1.evaluation.task import Item, Measure, Outcome, build_task, prompt_text
from megatron_mm1.inference.requests import Score


def png(colour) -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), colour).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def corpus(tmp_path):
    """A corpus of 12 concepts drawn in two styles (the last concept's two captions alike) and 6 questions."""
    captions = tmp_path / "raw/captions/validation"
    questions = tmp_path / "raw/questions/validation"
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
    return tmp_path


def scores(*losses: float) -> tuple[Score, ...]:
    """Scores of four tokens with the given losses per token."""
    return tuple(Score((-loss,) * 4) for loss in losses)


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
    measures = task.measure(task.items()[0], Outcome(text="", scores=scores(*losses)))
    assert measures["choice_accuracy"].value == right
    names = ("loss_true_image", "loss_other_image", "loss_gain")
    assert [measures[name] for name in names] == [Measure(1.0), Measure(1.5), Measure(0.5)]


def test_caption_items(corpus):
    items = DemoCaptions(corpus).items()
    assert sorted(item.key for item in items) == sorted(
        f"images/{s}-{n}.png" for s in ("noto", "twemoji") for n in range(12)
    )
    assert [item.key for item in items] != sorted(item.key for item in items)  # any beginning is a sample
    for item in items:
        prompts, captions = zip(*item.scored, strict=True)
        assert captions[::2] == captions[1::2] and captions[0] == item.reference
        assert len(set(captions)) == 10
        assert set(prompts[::2]) == {item.prompt} and len(set(prompts[1::2])) == 1
        assert prompts[1] != item.prompt
        assert item.groups == ("unseen" if item.cluster in ("C0", "C1", "C2", "C3") else "heldstyle",)


def test_concepts_weigh_the_same(corpus):
    file = corpus / "raw/captions/validation/captions.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[1:]))  # one concept is drawn in one style only
    weights = Counter()
    for item in DemoCaptions(corpus).items():
        weights[item.cluster] += item.weight
    assert set(weights.values()) == {1.0} and len(weights) == 12


def test_the_other_image_is_of_another_caption(corpus):
    """Concepts 10 and 11 are called the same: each image of one would do for the other."""
    items = DemoCaptions(corpus).items()
    captions = {item.prompt: item.reference for item in items}
    assert all(captions[item.scored[1][0]] != item.reference for item in items)


def test_items_are_the_same_every_time(corpus):
    assert DemoCaptions(corpus).items() == DemoCaptions(corpus).items()
    assert DemoQuestions(corpus).items() == DemoQuestions(corpus).items()


def test_question_items_are_asked_as_they_are_trained(corpus):
    by_answer = {item.reference: item for item in DemoQuestions(corpus).items()}
    assert set(by_answer) == {"circle", "red", "yes", "no", "rectangle", "teal"}
    assert by_answer["red"].prompt == (Image(png("red")), Text(question_prompt("what about red?")))
    assert by_answer["circle"].groups == ("shape", "shape or colour")
    assert by_answer["no"].groups == ("yes-no",)


@pytest.mark.parametrize(("text", "right"), [("red", 1.0), ("blue", 0.0), ("", 0.0), ("red red", 0.0)])
def test_question_accuracy(corpus, text, right):
    task = DemoQuestions(corpus)
    item = next(item for item in task.items() if item.reference == "red")
    assert question_answer(item.reference).strip() == item.reference
    assert task.measure(item, Outcome(text=text, scores=())) == {"accuracy": Measure(right)}


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
    (tmp_path / "their_package.py").write_text("class Task:\n    max_new_tokens = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build_task("their_package.Task").max_new_tokens == 3


def measured(key, value, *, weight=1.0, item_weight=1.0, groups=("g",), cluster=None) -> MeasuredItem:
    prompt = (Image(b""), Text("why?"))
    item = Item(key=key, prompt=prompt, reference="r", groups=groups, cluster=cluster, weight=item_weight)
    return MeasuredItem(item, Outcome(text="o", scores=()), {"m": Measure(value, weight=weight)})


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
    tasks = {"t": [measured("a", 1.0), measured("b", 0.0)]}
    written = write_results(tmp_path / "out", {"checkpoint": {"iteration": 7}}, tasks)
    assert read_figures(tmp_path / "out") == written
    assert json.loads((tmp_path / "out/results.json").read_text())["checkpoint"] == {"iteration": 7}
    rows = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "task": "t",
        "key": "a",
        "groups": ["g"],
        "prompt": "<image>why?",
        "output": "o",
        "reference": "r",
        "scores": [],
        "measures": {"m": 1.0},
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items.jsonl", "results.json"]


def test_table_shows_every_figure():
    lines = table({"t": figures([measured("a", 1.0), measured("b", 1.0)])}).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["t", "all", "m"], ["t", "g", "m"]]
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
    assert prompt_text((Text("see "), Image(b""), Text(" there"))) == "see <image> there"


def test_contact_sheet_shows_the_images(tmp_path):
    colours = [(200, 30, 60), (10, 120, 240)]
    panels = [Panel(png(colour), question="", output="a $ sign, a\nline", reference="b") for colour in colours]
    write_contact_sheet(tmp_path / "sheet.png", [("captions", panels), ("questions", panels[:1])])
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        shown = dict((colour, count) for count, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 20))
        assert sheet.width <= 1400
    assert shown[colours[0]] == pytest.approx(2 * shown[colours[1]], rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
