"""Every benchmark reads its official layout, and says what is wrong with another."""

import io
import json
from collections import Counter
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mm1.data.image_headers import image_size
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.fewshot import FewShot, demonstration_pool, request
from megatron_mm1.evaluation.items import ImageFile, Item, Split
from megatron_mm1.evaluation.task import TASKS, Outcome, build_task
from megatron_mm1.evaluation.template import prompt_text

TEN = ["red"] * 7 + ["dark red"] * 3


def jpeg(colour=(90, 20, 200)) -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", (48, 32), colour).save(content, "JPEG")
    return content.getvalue()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg())


def write(folder: Path, name: str, value) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def coco(folder: Path) -> None:
    names = {"test": "COCO_val2014_000000000001.jpg", "train": "COCO_train2014_000000000002.jpg"}
    images = []
    for number, (split, name) in enumerate(names.items(), 1):
        part = name.split("_")[1]
        put(folder, f"{part}/{name}")
        sentences = [{"raw": f"A dog {split}.", "tokens": ["a"]}, {"raw": "A brown dog runs.\n", "tokens": ["a"]}]
        images.append({"filepath": part, "filename": name, "cocoid": number, "split": split, "sentences": sentences})
    write(folder, "dataset_coco.json", {"images": images, "dataset": "coco"})


def nocaps(folder: Path) -> None:
    put(folder, "val/0013ea20.jpg")
    annotations = [{"image_id": 0, "id": n, "caption": caption} for n, caption in enumerate(["A dog.", "A hound."])]
    images = [{"id": 0, "file_name": "0013ea20.jpg", "open_images_id": "0013ea20", "domain": "near-domain"}]
    write(folder, "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})
    coco(folder / "coco")


def textcaps(folder: Path) -> None:
    put(folder, "train_images/a1.jpg", "train_images/b2.jpg")
    for split, image in (("val", "a1"), ("train", "b2")):
        captions = ["A sign says stop.", "A stop sign."]
        rows = [
            {"image_id": image, "caption_str": one, "reference_strs": captions, "set_name": split} for one in captions
        ]
        write(folder, f"TextCaps_0.1_{split}.json", {"data": rows, "dataset_name": "textcaps"})


def coco_questions(folder: Path, *, prefix: str, answer: str) -> None:
    for number, split in enumerate(("val2014", "train2014"), 1):
        put(folder, f"{split}/COCO_{split}_{number:012}.jpg")
        questions = [{"image_id": number, "question": "What colour?", "question_id": 10 * number}]
        answers = [{answer: text, "answer_id": n, "answer_confidence": "yes"} for n, text in enumerate(TEN, 1)]
        annotations = [{"question_id": 10 * number, "image_id": number, "answer_type": "other", "answers": answers}]
        write(folder, f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        write(folder, f"{prefix}mscoco_{split}_annotations.json", {"annotations": annotations})


def vqav2(folder: Path) -> None:
    coco_questions(folder, prefix="v2_", answer="answer")


def okvqa(folder: Path) -> None:
    coco_questions(folder, prefix="", answer="raw_answer")


def textvqa(folder: Path) -> None:
    put(folder, "train_images/a1.jpg", "train_images/b2.jpg")
    for number, (split, image) in enumerate((("val", "a1"), ("train", "b2"))):
        row = {"question": "What colour?", "image_id": image, "question_id": number, "answers": TEN}
        write(folder, f"TextVQA_0.5.1_{split}.json", {"data": [row]})


def vizwiz(folder: Path) -> None:
    for split in ("val", "train"):
        put(folder, f"{split}/VizWiz_{split}_00000000.jpg")
        answers = [{"answer": text, "answer_confidence": "yes"} for text in TEN]
        row = {"image": f"VizWiz_{split}_00000000.jpg", "question": "What colour?", "answers": answers}
        write(folder, f"Annotations/{split}.json", [{**row, "answer_type": "other", "answerable": 1}])


def scienceqa_img(folder: Path) -> None:
    row = {"question": "Which colour?", "choices": ["blue", "red"], "answer": 1, "hint": "Look.", "subject": "science"}
    problems = {
        "1": {**row, "image": "image.png", "lecture": "On colours.", "solution": "It is red."},
        "2": {**row, "image": None, "hint": ""},
        "3": {**row, "image": "image.png", "lecture": "", "solution": "Not blue."},
    }
    put(folder, "images/test/1/image.png", "images/train/3/image.png")
    write(folder, "problems.json", problems)
    write(folder, "pid_splits.json", {"test": ["1", "2"], "train": ["3"]})


def mmmu(folder: Path) -> None:
    for split in ("validation", "dev"):
        rows = [
            {
                "id": f"{split}_Art_1",
                "question": "Is <image 2> like <image 1>?",
                "options": "['blue', \"red's\"]",
                "explanation": "They match.",
                "answer": "B",
                "question_type": "multiple-choice",
                "image_1": {"bytes": jpeg((1, 2, 3)), "path": None},
                "image_2": {"bytes": jpeg((200, 2, 3)), "path": None},
            },
            {
                "id": f"{split}_Art_2",
                "question": "How many in <image 1>?",
                "options": "[]",
                "explanation": "",
                "answer": "['3', 'three']",
                "question_type": "open",
                "image_1": {"bytes": jpeg((9, 9, 9)), "path": "x.png"},
                "image_2": None,
            },
        ]
        (folder / "Art").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "Art" / f"{split}-00000-of-00001.parquet", row_group_size=1)


def mathvista(folder: Path) -> None:
    put(folder, "images/1.jpg", "images/2.jpg", "images/3.jpg")
    row = {"question": "How far?", "unit": "m", "precision": 1.0, "answer_type": "float", "answer": "1.2"}
    problems = {
        "1": {**row, "image": "images/1.jpg", "choices": None, "pid": "1", "question_type": "free_form"},
        "2": {**row, "image": "images/2.jpg", "choices": ["1", "1.2"], "pid": "2", "answer_type": "text", "unit": None},
    }
    shown = {"pid": "d", "image": "images/3.jpg", "solution": "Measure it."}
    write(folder, "annot_testmini.json", problems)
    write(folder, "annot_demonstrations.json", {"d": {**problems["1"], **shown}})


def pope(folder: Path) -> None:
    put(folder, "val2014/COCO_val2014_000000000001.jpg")
    for strategy in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog?", "label": label}
            for n, label in enumerate(("yes", "no"), 1)
        ]
        write(folder, f"coco_pope_{strategy}.json", "".join(json.dumps(row) + "\n" for row in rows))


def ai2d(folder: Path) -> None:
    for name, letters in (("0", False), ("1", False), ("2", True)):
        row = {"abcLabel": letters, "answerTexts": ["ears", "nose"], "correctAnswer": 1, "questionId": f"{name}.png-0"}
        write(folder, f"questions/{name}.png.json", {"imageName": f"{name}.png", "questions": {"What is it?": row}})
    put(folder, "images/0.png", "images/1.png", "images/2.png", "abc_images/2.png")
    write(folder, "ai2d_test_ids.csv", "0\n2\n")


def chartqa(folder: Path) -> None:
    for split in ("test", "train"):
        for writer in ("human", "augmented"):
            put(folder, f"{split}/png/{writer}.png")
            row = {"imgname": f"{writer}.png", "query": "How much?", "label": "12.5"}
            write(folder, f"{split}/{split}_{writer}.json", [row])


def docvqa(folder: Path) -> None:
    for number, split in enumerate(("val", "train")):
        put(folder, f"documents/{split}.png")
        row = {
            "questionId": number,
            "question": "Who?",
            "image": f"documents/{split}.png",
            "answers": ["Ann", "ann b."],
        }
        name = "val_v1.0_withQT.json" if split == "val" else "train_v1.0.json"
        write(folder, name, {"dataset_name": "docvqa", "data": [row]})


LAYOUTS = {
    one.__name__: one
    for one in (
        *(coco, nocaps, textcaps, vqav2, okvqa, textvqa, vizwiz),
        *(scienceqa_img, mmmu, mathvista, pope, ai2d, chartqa, docvqa),
    )
}
WITHOUT_TRAINING = {"pope"}
FILES = {
    "coco": "dataset_coco.json",
    "nocaps": "nocaps_val_4500_captions.json",
    "textcaps": "TextCaps_0.1_val.json",
    "vqav2": "v2_mscoco_val2014_annotations.json",
    "okvqa": "OpenEnded_mscoco_val2014_questions.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "vizwiz": "Annotations/val.json",
    "scienceqa_img": "problems.json",
    "mmmu": "Art/validation-00000-of-00001.parquet",
    "mathvista": "annot_testmini.json",
    "pope": "coco_pope_popular.json",
    "ai2d": "ai2d_test_ids.csv",
    "chartqa": "test/test_augmented.json",
    "docvqa": "val_v1.0_withQT.json",
}


def built(name: str, folder: Path):
    LAYOUTS[name](folder)
    return build_task(name, folder)


def by_key(split: Split) -> dict[str, Item]:
    return {item.key: item for item in split.items}


def test_every_benchmark_is_tested():
    assert set(LAYOUTS) | {"demo_captions", "demo_questions", "demo_questions_exchanged"} == set(TASKS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_truth_scores_full_marks_behind_a_demonstration(name, tmp_path):
    task = built(name, tmp_path)
    split = task.items()
    assert split.rejected == ()
    for item in split.items:
        assert all(image_size(image.read().data) == (32, 48) for image in item.images)
    settings = FewShot(shots=0 if name in WITHOUT_TRAINING else 1)
    pool = demonstration_pool(task, settings)
    made = [request(item, task, settings, pool=pool) for item in split.items]
    assert all(len(one.demonstrations) == settings.shots for one in made)
    assert all("{" not in prompt_text(one.prompt) for one in made)
    assert not [item for item in split.items if any(stop in item.answer for stop in task.stopping.strings)]
    outcomes = [Outcome(settings.answer(f" {item.answer}")) for item in split.items]
    headlines = [measures[task.headline] for measures in task.measure(split.items, outcomes)]
    values = [measure.value for measure in headlines if measure.weight]
    if task.headline == "cider":
        assert values == [0.0]  # of one image alone no word is rare
    else:
        assert values == [1.0] * len(values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_demonstration_is_an_item(name, tmp_path):
    task = built(name, tmp_path)
    if name in WITHOUT_TRAINING:
        with pytest.raises(UserError, match="no training split"):
            task.demonstrations()
        return
    places = {image.place for item in task.items().items for image in item.images}
    demonstrations = {image.place for item in task.demonstrations().items for image in item.images}
    assert not places & demonstrations


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_file(name, tmp_path):
    task = built(name, tmp_path)
    (tmp_path / FILES[name]).unlink()
    with pytest.raises(UserError, match=str(tmp_path)):
        task.items()


@pytest.mark.parametrize("content", ["", "{}", "[]", "[3]", '{"images": [], "data": [null], "questions": 1}', "\xff"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout(name, content, tmp_path):
    task = built(name, tmp_path)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".parquet"):
            file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=str(tmp_path)):
        task.items()


@pytest.mark.parametrize("name", set(LAYOUTS) - {"mmmu"})
def test_missing_images_are_counted(name, tmp_path):
    task = built(name, tmp_path)
    images = sorted({image.path for item in task.items().items for image in item.images})
    for image in images[1:]:
        image.unlink()
    if len(images) > 1:
        split = build_task(name, tmp_path).items()
        assert split.counts() == {"image file missing or unreadable": len(task.items().items) - len(split.items)}
        assert all(str(tmp_path) in one.detail for one in split.rejected)
    images[0].unlink()
    with pytest.raises(UserError, match=r"can be used, the first .*image file missing"):
        build_task(name, tmp_path).items()


def test_any_beginning_is_a_sample_and_other_records_do_not_move_it():
    keys = [f"{number:03}" for number in range(400)]
    order = [item.key for item in Split.of(map(Item, keys), source="s").items]
    assert sorted(order) == keys
    assert 80 < sum(key < "200" for key in order[:200]) < 120  # 100, with a deviation of 5
    few = [item.key for item in Split.of(map(Item, reversed(keys[::3])), source="s").items]
    assert few == [key for key in order if key in set(keys[::3])]


def test_captions(tmp_path):
    [item] = built("coco", tmp_path).items().items
    assert (item.key, item.answer, item.references) == ("1", "A dog test.", ("A dog test.", "A brown dog runs."))
    [item] = built("nocaps", tmp_path / "n").items().items
    assert (item.groups, item.references) == (("near-domain",), ("A dog.", "A hound."))


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz"])
def test_questions_with_ten_answers(name, tmp_path):
    [item] = built(name, tmp_path).items().items
    assert (item.question, item.answer, item.references) == ("What colour?", "red", tuple(TEN))


def test_a_question_without_its_answers(tmp_path):
    task = built("vqav2", tmp_path)
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    rows = json.loads(file.read_text())["questions"]
    file.write_text(json.dumps({"questions": [*rows, {**rows[0], "question_id": 99}, *rows]}))
    split = task.items()
    assert len(split.items) == 1
    assert Counter(split.counts()) == {"sample without an image or a text": 1, "duplicate key": 1}


def test_science_questions_without_an_image_are_not_of_the_task(tmp_path):
    task = built("scienceqa_img", tmp_path)
    [item] = task.items().items
    assert prompt_text(task.template(item).asked(item)).startswith(
        "<image>Question: Which colour?\nContext: Look.\nA. blue\nB. red\n"
    )
    assert (item.answer, item.rationale) == ("B", "On colours. It is red.")
    assert task.demonstrations().items[0].rationale == "Not blue."


def test_images_in_a_table_stand_where_they_are_mentioned(tmp_path):
    task = built("mmmu", tmp_path)
    items = by_key(task.items())
    choice, number = items["validation_Art_1"], items["validation_Art_2"]
    shown = [part for part in task.template(choice).asked(choice) if isinstance(part, ImageFile)]
    colours = [PIL.Image.open(io.BytesIO(image.read().data)).getpixel((0, 0))[0] for image in shown]
    assert colours[0] > 190 and colours[1] < 10
    assert choice.choices == ("blue", "red's")
    assert number.references == ("3", "three")
    assert prompt_text(task.template(number).asked(number)) == "Question: How many in <image>? Short answer:"
    assert PIL.Image.open(io.BytesIO(number.images[0].read().data)).getpixel((0, 0)) == (9, 9, 9)


def test_marks_without_their_images(tmp_path):
    task = built("mmmu", tmp_path)
    file = tmp_path / FILES["mmmu"]
    rows = pq.read_table(file).to_pylist()
    rows[0]["image_2"], rows[1]["image_1"] = None, None
    pq.write_table(
        pa.Table.from_pylist([*rows, {**rows[1], "id": "3", "image_1": {"bytes": jpeg(), "path": None}}]), file
    )
    split = task.items()
    assert list(by_key(split)) == ["3"]
    assert split.counts() == {"image marks and images do not match": 1, "sample without an image or a text": 1}


def test_mathvista_forms(tmp_path):
    items = by_key(built("mathvista", tmp_path).items())
    assert items["1"].question == "How far? (Unit: m)"
    assert dict(items["1"].attributes) == {"answer_type": "float", "precision": "1"}
    assert (items["2"].answer, items["2"].references) == ("B", ("1.2",))


def test_lettered_diagrams(tmp_path):
    items = by_key(built("ai2d", tmp_path).items())
    assert [image.path.parent.name for key in ("0.png-0", "2.png-0") for image in items[key].images] == [
        "images",
        "abc_images",
    ]


def test_unreadable_image(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").write_text("no image")
    ImageFile(tmp_path / "a.jpg").read()
    for name, why in (("b.jpg", "not an image"), ("c.jpg", "cannot be read")):
        with pytest.raises(UserError, match=rf"{name}: {why}"):
            ImageFile(tmp_path / name).read()


@pytest.mark.parametrize("name", ["../out.jpg", "/etc/out.jpg"])
def test_paths_outside_the_folder(name, tmp_path):
    put(tmp_path, "out.jpg")
    (tmp_path / "in").mkdir()
    task = built("docvqa", tmp_path / "in")
    write(
        tmp_path / "in",
        FILES["docvqa"],
        {"data": [{"questionId": 1, "question": "?", "image": name, "answers": ["a"]}]},
    )
    with pytest.raises(UserError, match="image path leaves the folder"):
        task.items()


def test_a_task_says_whether_it_takes_a_folder(tmp_path):
    with pytest.raises(UserError, match="reads its data from a folder: say which"):
        build_task("coco")
    with pytest.raises(UserError, match="no folder"):
        build_task("coco", tmp_path / "none")
