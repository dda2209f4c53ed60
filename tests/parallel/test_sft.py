"""Fine-tuning as users do it: conversations through a chat template, `--recipe sft`, a checkpoint of another layout."""

import json

import numpy as np
import pytest

from megatron_mm1.config.loading import load_config
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.tokenizer import open_tokenizer
from tests.corpora import encoded
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of
from tests.parallel.test_trainer import records

LAYOUTS = {
    "one process": (1, []),
    "TP2+SP": (2, ["--tensor_model_parallel_size", "2", "--sequence_parallel"]),
    "DP2": (2, []),
}
WORDS = ["red", "green", "blue", "yellow", "square", "circle", "big", "small"]

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def instructions(demo_corpus, tmp_path_factory):
    """Prepared conversations of no to three images, and a few that are too long."""
    folder = tmp_path_factory.mktemp("instructions")
    rng = np.random.default_rng(0)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(seed=number))

    def said(words):
        return " ".join(rng.choice(WORDS, words))

    rows = []
    for number in range(60):
        images = [f"{image}.png" for image in rng.integers(0, 4, number % 4)]
        turns = [("human", f"{'<image>' * len(images)}\n{said(3)}?"), ("gpt", said(4))]
        turns += [("human", said(2)), ("gpt", said(40 if number % 6 == 0 else 2))] * (4 if number % 6 == 0 else 1)
        rows.append({"image": images, "conversations": [{"from": who, "value": what} for who, what in turns]})
    rows.append({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": said(400)}]})
    (folder / "chats.json").write_text(json.dumps(rows))
    tokenizer = open_tokenizer(demo_corpus / "tokenizer.model")
    reader = open_reader("chat", folder / "chats.json", tokenizer=tokenizer.path)
    prepare(reader, tokenizer=tokenizer, output=folder / "prepared")
    return folder / "prepared"


@pytest.fixture(scope="module")
def pretrained(pool, demo_corpus, tmp_path_factory):
    """A checkpoint written by two pipeline stages."""
    return pool(2).run(
        jobs.save_initial, config_of("mm1-tiny", pipeline_model_parallel_size=2), tmp_path_factory.mktemp("pretrained")
    )[0]


def sft_config(run_dir, pretrained, instructions, *layout):
    settings = {
        "checkpoint.load": pretrained,
        "run_dir": run_dir,
        "data.sources": f"[{{name: instructions, path: {instructions}}}]",
        "data.seq_length": 128,
        "training.train_iters": 6,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 2,
        "training.eval_interval": 0,
        "optimizer.lr": 3e-3,
        "optimizer.lr_warmup_iters": 1,
        "logging.log_interval": 1,
        "parallel.tensor_model_parallel_size": 1,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return load_config(["--preset", "mm1-tiny", "--recipe", "sft", *options, *layout])


@pytest.fixture(scope="module")
def alone(pool, pretrained, instructions, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    pool(1).run(jobs.train_as_users_do, sft_config(run_dir, pretrained, instructions))
    return records(run_dir, "train")


def test_fine_tuning_learns_and_its_rate_ends_at_zero(alone):
    losses = [record["lm_loss"] for record in alone]
    assert losses[-1] < 0.8 * losses[0]
    rates = [record["learning_rate"] for record in alone]
    assert rates[0] == 0 and max(rates) == pytest.approx(3e-3) and rates[-1] < 0.4e-3
    assert rates == [record["learning_rate tower"] for record in alone]


@pytest.mark.parametrize("layout", ["TP2+SP", "DP2"])
def test_fine_tuning_is_the_same_in_every_layout(pool, pretrained, instructions, alone, tmp_path, layout):
    world_size, options = LAYOUTS[layout]
    pool(world_size).run(jobs.train_as_users_do, sft_config(tmp_path, pretrained, instructions, *options))
    for ours, theirs in zip(records(tmp_path, "train"), alone, strict=True):
        # AdaFactor divides each gradient by its size: also where it is only rounding, as for the tower's key biases.
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-3)
    first, reference = records(tmp_path, "train")[0], alone[0]
    assert first["lm_loss"] == pytest.approx(reference["lm_loss"], rel=1e-5)


def test_conversations_that_are_too_long_are_counted(pretrained, instructions, tmp_path):
    from megatron_mm1.data.plan import training_data

    config = sft_config(tmp_path, pretrained, instructions)
    data = training_data(config, tokenizer=open_tokenizer(config.data.tokenizer))
    [sentence] = data.long_documents()
    assert sentence == (
        "instructions: of 61 documents 10 are cut at the end of an answer and 1 left out, since they do not fit a "
        "sequence"
    )
    source, seen = data.sources[0], set()
    for index in range(len(data.plan.ingredients[0].stream)):
        for piece in data.plan.sequence(index):
            seen.add(piece.document)
            content = source.piece(piece.document, piece.start, piece.stop)
            assert piece.start == 0 and content.trained.any()
            whole = source.piece(piece.document)
            assert piece.stop == len(whole.tokens) or (content.trained[-1] and not whole.trained[piece.stop])
    assert len(seen) == 60
