"""Generation and scoring equal one prompt at a time, one token at a time, in every batch and every parallel layout."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from megatron_mm1.config.presets import preset
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.tokenizer import open_tokenizer, train_tokenizer
from megatron_mm1.inference.requests import Failure, Sampling
from tests.parallel import generation_jobs as generation
from tests.parallel import jobs
from tests.parallel.generation_jobs import lively, with_data

NEW_TOKENS = 6
LAYOUTS = {
    "TP2": ("mm1-tiny", dict(tensor_model_parallel_size=2)),
    "TP2 + SP": ("mm1-tiny", dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": ("mm1-tiny", dict(pipeline_model_parallel_size=2)),
    "DP2": ("mm1-tiny", {}),
    "TP2 x PP2": ("mm1-tiny", dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "EP2": ("mm1-tiny-moe", dict(expert_model_parallel_size=2)),
    "TP2 + SP, EP2": (
        "mm1-tiny-moe",
        dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
    ),
}


def processes(sizes) -> int:
    return max(2, sizes.get("tensor_model_parallel_size", 1) * sizes.get("pipeline_model_parallel_size", 1))


def picture(seed: int) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, "PNG")
    return Image(content.getvalue())


A, B = picture(1), picture(2)
PROMPTS = [
    (A,),
    (B,),
    (A, Text("Question: what is this? Short answer:")),
    (Text("the first one "), A, Text(" and the second one "), B),
    (Text("no image at all, but a longer text than the others"),),
    (A, A),
]
CONTINUATIONS = ["a cat", "a cat", " a dog", "!", "", "a somewhat longer description of it"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    words = [
        "cat",
        "dog",
        "first",
        "second",
        "question",
        "short",
        "answer",
        "what",
        "image",
        "longer",
        "text",
        "others",
    ]
    train_tokenizer([" ".join(words), " ".join(reversed(words))] * 20, path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def model(pool, tokenizer, tmp_path_factory):
    """`model(preset)`: (configuration of one process, checkpoint of random weights, what the slow loop makes of it)."""
    known = {}

    def get(name: str):
        if name not in known:
            config = with_data(preset(name), tokenizer=str(tokenizer), seq_length=64, max_images_per_sequence=4)
            config = jobs.with_parallel(lively(config))
            [checkpoint] = pool(1).run(jobs.save_initial, config, tmp_path_factory.mktemp(name))
            arguments = (config, checkpoint, PROMPTS, CONTINUATIONS)
            [expected] = pool(1).run(generation.run_slowly, *arguments, max_new_tokens=NEW_TOKENS)
            known[name] = config, checkpoint, expected
        return known[name]

    return get


@pytest.fixture
def run(pool, model):
    """Run the engine on mm1-tiny in one process."""

    def run(prompts=PROMPTS, continuations=CONTINUATIONS, *, max_new_tokens=NEW_TOKENS, data=None, **options):
        config, checkpoint, _ = model("mm1-tiny")
        config = with_data(config, **(data or {}))
        [result] = pool(1).run(
            generation.run_engine, config, checkpoint, prompts, continuations, max_new_tokens=max_new_tokens, **options
        )
        return result

    return run


def assert_scores(scores, expected):
    for score, (log_likelihood, num_tokens) in zip(scores, expected, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
        assert score.num_tokens == num_tokens


def test_the_reference_looks_at_its_prompt(model):
    ids, scores = model("mm1-tiny")[2]
    assert len({tuple(sequence) for sequence in ids}) == len(PROMPTS)
    assert scores[0] != pytest.approx(scores[1], rel=1e-4)  # the same caption behind another image


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_ragged_batches_equal_single_prompts(run, model, batch_size):
    ids, scores = run(batch_size=batch_size)
    expected_ids, expected_scores = model("mm1-tiny")[2]
    assert ids == expected_ids
    assert_scores(scores, expected_scores)


@pytest.mark.parametrize(("name", "sizes"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_equal_one_process(pool, model, name, sizes):
    config, checkpoint, (expected_ids, expected_scores) = model(name)
    config = jobs.with_parallel(config, **sizes)
    arguments = (config, checkpoint, PROMPTS, CONTINUATIONS)
    # Batches of 5 and 1: one row of an odd length is what sequence parallelism must pad.
    workers = pool(processes(sizes))
    for ids, scores in workers.run(generation.run_engine, *arguments, max_new_tokens=NEW_TOKENS, batch_size=5):
        assert ids == expected_ids
        assert_scores(scores, expected_scores)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_tiled_images_in_a_layout(pool, model, layout):
    """Of one process `tests/integration/test_engine.py` shows that it sees them as training does."""
    name, sizes = LAYOUTS[layout]
    config, checkpoint, _ = model(name)
    config = with_data(config, seq_length=512, image_tiling="overview_and_crops", tile_indicators=True)
    arguments = (checkpoint, PROMPTS, CONTINUATIONS)
    [(expected, expected_scores)] = pool(1).run(
        generation.run_engine, config, *arguments, max_new_tokens=NEW_TOKENS, batch_size=1
    )
    config = jobs.with_parallel(config, **sizes)
    for ids, scores in pool(2).run(generation.run_engine, config, *arguments, max_new_tokens=NEW_TOKENS, batch_size=5):
        assert ids == expected
        assert_scores(scores, [(one.log_likelihood, one.num_tokens) for one in expected_scores])


@pytest.mark.parametrize("layout", ["TP2", "TP2 x PP2", "EP2"])
def test_the_same_seeds_give_the_same_texts_in_a_layout(pool, model, layout):
    name, sizes = LAYOUTS[layout]
    config, checkpoint, (greedy, _) = model(name)
    kinds = [dict(), dict(top_k=9), dict(top_p=0.9), dict(top_k=50, top_p=0.7), dict(temperature=0.7), dict(top_p=0.99)]
    samplings = [Sampling(**{"temperature": 1.2, "seed": n, **kind}) for n, kind in enumerate(kinds)]
    options = dict(max_new_tokens=NEW_TOKENS, samplings=samplings)
    arguments = (checkpoint, PROMPTS, CONTINUATIONS)
    [(expected, _)] = pool(1).run(generation.run_engine, config, *arguments, **options, batch_size=1)
    assert expected != greedy
    config = jobs.with_parallel(config, **sizes)
    for ids, _ in pool(processes(sizes)).run(generation.run_engine, config, *arguments, **options, batch_size=4):
        assert ids == expected


TRAINING_LAYOUTS = {
    "TP2 + SP, images shared out": (
        "mm1-tiny",
        dict(tensor_model_parallel_size=2, sequence_parallel=True, vision_parallel_mode="data"),
    ),
    "PP2 VPP2": ("mm1-tiny", dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "CP2": ("mm1-tiny", dict(context_parallel_size=2)),
    "EP2, distributed optimizer": (
        "mm1-tiny-moe",
        dict(expert_model_parallel_size=2, use_distributed_optimizer=True),
    ),
}


@pytest.mark.parametrize(("name", "sizes"), TRAINING_LAYOUTS.values(), ids=TRAINING_LAYOUTS)
def test_a_model_in_training_answers_and_trains_on_as_if_nobody_had_asked(pool, model, name, sizes):
    config, checkpoint, (expected_ids, _) = model(name)
    config = jobs.with_parallel(config, **sizes)
    ranks = pool(2).run(generation.ask_in_training, config, checkpoint, PROMPTS, max_new_tokens=NEW_TOKENS)
    for ids, same in ranks:
        assert ids == expected_ids
        assert same


def test_the_end_of_text_stops_one_prompt_and_not_the_others(run):
    endless, _ = run(special_ids={"eos_id": 310})  # a row that is no piece, so it is never generated
    assert {len(sequence) for sequence in endless} == {NEW_TOKENS}
    end = next(token for token in endless[0][1:] if any(token not in sequence for sequence in endless))
    ids, _ = run(special_ids={"eos_id": end})
    assert ids == [sequence[: sequence.index(end)] if end in sequence else sequence for sequence in endless]
    assert len(ids[0]) < NEW_TOKENS and NEW_TOKENS in map(len, ids)


def test_text_goes_on_when_every_prompt_with_an_image_has_ended(run, model):
    first = model("mm1-tiny")[2][0][0][0]  # what image A is followed by: then it ends at once
    prompts = [(A,), (Text("what"),)]
    together, _ = run(prompts, ["a"] * 2, special_ids={"eos_id": first})
    alone, _ = run(prompts[1:], ["a"], special_ids={"eos_id": first})
    assert together[0] == []
    assert len(together[1]) > 1 and together[1] == alone[0]


def test_padding_is_never_generated(run, model):
    banned = model("mm1-tiny")[2][0][0][0]
    ids, _ = run(special_ids={"pad_id": banned})
    assert all(banned not in sequence for sequence in ids)


def test_a_model_trained_without_images_sees_none(run):
    ids, _ = run([(A,), (B,), (A, Text("what")), (Text("what"),)], ["a"] * 4, data={"text_only": True})
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]


def test_what_cannot_be_answered_says_so_and_leaves_the_others_alone(run, model):
    damaged = Image(A.data[:60])
    prompts = [PROMPTS[2], (A, damaged), PROMPTS[3], tuple([A] * 20), (damaged,)]
    ids, scores = run(prompts, ["a cat"] * 5)
    expected = [
        "image 2 of the prompt cannot be decoded",
        "the prompt's 81 positions (20 images of 4 each) and 6 more do not fit the 64 that the model was trained with: "
        "shorten it, leave images out, or ask for less",
        "image 1 of the prompt cannot be decoded",
    ]
    assert [ids[n].message for n in (1, 3, 4)] == expected
    assert [ids[0], ids[2]] == [model("mm1-tiny")[2][0][n] for n in (2, 3)]
    assert [isinstance(score, Failure) for score in scores] == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("mm1-tiny", {}, [(2, 0, True), (2, 1, True)]),
        ("mm1-tiny", dict(tensor_model_parallel_size=2), [(1, 0, True), (1, 0, False)]),
        ("mm1-tiny", dict(pipeline_model_parallel_size=2), [(1, 0, True), (1, 0, False)]),
        ("mm1-tiny-moe", dict(expert_model_parallel_size=2), [(1, 0, True), (1, 0, False)]),
    ],
)
def test_ranks_that_share_weights_work_on_the_same_prompts(pool, model, name, sizes, expected):
    config = jobs.with_parallel(model(name)[0], **sizes)
    assert pool(2).run(generation.replicas, config) == expected


def mm1(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_mm1", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_caption_refuses_a_file_that_is_no_image(model, tmp_path):
    file = tmp_path / "notes.png"
    file.write_text("no image")
    result = mm1("caption", "--checkpoint", model("mm1-tiny")[1], "--image", file)
    assert (result.returncode, result.stderr.strip().splitlines()[-1]) == (
        2,
        f"mm1: error: cannot use image {file}: not an image",
    )


def test_caption_refuses_another_tokenizer(model, tokenizer, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(A.data)
    checkpoint = shutil.copytree(model("mm1-tiny")[1], tmp_path / "checkpoint")
    fields = json.loads((checkpoint / "mm1.json").read_text())
    (checkpoint / "mm1.json").write_text(json.dumps({**fields, "tokenizer_fingerprint": "another"}))
    result = mm1("caption", "--checkpoint", checkpoint, "--image", file)
    assert result.returncode == 2
    assert open_tokenizer(tokenizer).fingerprint[:12] in result.stderr


def test_a_tokenizer_that_has_moved_is_named(model, tokenizer, tmp_path):
    picture, moved = tmp_path / "picture.png", tmp_path / "moved.model"
    picture.write_bytes(A.data)
    command = ["caption", "--checkpoint", model("mm1-tiny")[1], "--image", picture, "--max-new-tokens", "2"]
    tokenizer.rename(moved)
    try:
        without, named = mm1(*command), mm1(*command, "--tokenizer", moved)
    finally:
        moved.rename(tokenizer)
    assert without.returncode == 2
    assert f"no tokenizer at '{tokenizer}': set data.tokenizer (--tokenizer," in without.stderr
    assert named.returncode == 0 and f"{picture}: " in named.stdout


def test_lines_are_answered_in_order_and_bad_ones_have_an_error(model, tmp_path):
    (tmp_path / "a.png").write_bytes(A.data)
    question = {"prompt": "<image>Question: what is this? Short answer:", "images": ["a.png"]}
    lines = [
        json.dumps(question),
        "no JSON",
        json.dumps({**question, "images": ["b.png"], "id": 3}),
        json.dumps(question),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", "1"]
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    result = mm1("generate", "--checkpoint", model("mm1-tiny")[1], *files, *options)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "mm1: 2 of 4 lines could not be answered: see their error"
    first, second, third, fourth = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == fourth and first["num_tokens"] == len(model("mm1-tiny")[2][0][2])
    assert second["line"] == 2 and second["error"].startswith("this is no JSON")
    assert third["id"] == 3 and third["error"] == f"cannot read image {tmp_path}/b.png: No such file or directory"
