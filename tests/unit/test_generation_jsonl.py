"""Prompts as people write them: placeholders and image files, JSON lines with fields of their own."""

import json
from pathlib import Path

import pytest

from megatron_mm1.data.records import Image, Text
from megatron_mm1.errors import UserError
from megatron_mm1.inference.jsonl import answer_fields, generation_request, read_line, scoring_request
from megatron_mm1.inference.prompts import prompt_of
from megatron_mm1.inference.requests import Failure, Generation, GenerationRequest, Sampling, Score, ScoringRequest
from tests.corpora import encoded

A, B = (Image(encoded(seed=seed)) for seed in range(2))
DEFAULTS = dict(max_new_tokens=9, stop=["\n"], temperature=0.5, top_k=None, top_p=1.0, seed=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, image in (("a.png", A), ("b.png", B)):
        (tmp_path / name).write_bytes(image.data)
    (tmp_path / "notes.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "images", "prompt"),
    [
        ("<image> and <image>!", [A, B], [A, Text(" and "), B, Text("!")]),
        ("what?", [A, B], [A, B, Text("what?")]),
        ("<image><image>", [A, B], [A, B]),
        ("", [], []),
    ],
)
def test_images_take_the_places_of_their_placeholders(text, images, prompt):
    assert list(prompt_of(text, images)) == prompt


@pytest.mark.parametrize(("text", "images"), [("<image>", []), ("<image>", [A, B]), ("a<image>b<image>", [A])])
def test_as_many_images_as_placeholders(text, images):
    with pytest.raises(UserError, match=f"has {text.count('<image>')} placeholders <image> and {len(images)} images"):
        prompt_of(text, images)


def test_a_lines_own_fields_come_before_the_commands(folder):
    line = '{"id": 7, "prompt": "<image>so", "images": ["b.png"], "top_k": 3, "seed": 1, "stop": []}'
    fields = read_line(line)
    assert generation_request(fields, folder, defaults=DEFAULTS) == GenerationRequest(
        prompt=[B, Text("so")],
        max_new_tokens=9,
        stop=(),
        sampling=Sampling(temperature=0.5, top_k=3, top_p=1.0, seed=1),
    )


def test_a_line_to_be_scored(folder):
    fields = {"prompt": "x", "images": ["a.png"], "continuation": " y"}
    expected = ScoringRequest(prompt=[A, Text("x")], continuation=" y", with_end=True)
    assert scoring_request(fields, folder) == expected
    assert not scoring_request({**fields, "with_end": False}, folder).with_end


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is no JSON: Expecting property name"),
        ("[1]", "this is no JSON object"),
        ("{}", "the field 'prompt' is missing"),
        ('{"prompt": 3}', "prompt is 3: give text"),
        ('{"prompt": "", "images": "a.png"}', 'images is "a.png": give a list of file names'),
        ('{"prompt": "", "images": [1]}', r"images is \[1\]: give a list of file names"),
        ('{"prompt": "", "seed": true}', "seed is true: give a whole number"),
        ('{"prompt": "", "top_k": 1.5}', "top_k is 1.5: give a whole number or null"),
        ('{"prompt": "", "temperature": -1}', "temperature is -1: give 0"),
        ('{"prompt": "", "max_new_tokens": 0}', "max_new_tokens is 0: give 1 or more"),
        ('{"prompt": "", "stop": [""]}', "a stop string is empty"),
        ('{"prompt": "<image>", "images": ["none.png"]}', "cannot read image .*none.png: No such file or directory"),
        ('{"prompt": "<image>", "images": ["notes.png"]}', "cannot use image .*notes.png: not an image"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(folder, line, message):
    with pytest.raises(UserError, match=message):
        generation_request(read_line(line), folder, defaults=DEFAULTS)


def test_answers_as_fields():
    assert answer_fields(Generation("a", (4, 5), "stop")) == {"text": "a", "finish_reason": "stop", "num_tokens": 2}
    assert json.loads(json.dumps(answer_fields(Score((-1.0, -0.5))))) == {
        "log_likelihood": -1.5,
        "num_tokens": 2,
        "token_log_likelihoods": [-1.0, -0.5],
    }
    assert answer_fields(Failure("why")) == {"error": "why"}
