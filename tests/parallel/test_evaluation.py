"""Tasks on a model in every layout: the same outcomes, resumed to the byte, and training that does not notice."""

from pathlib import Path

import pytest

from megatron_mm1.config.presets import preset
from megatron_mm1.data.tokenizer import train_tokenizer
from megatron_mm1.evaluation.task import Refusal
from tests.new_words import WORDS, NewWords
from tests.parallel import evaluation_jobs, jobs
from tests.parallel.generation_jobs import lively, with_data

LAYOUTS = {
    "TP2 + SP": ("mm1-tiny", dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": ("mm1-tiny", dict(pipeline_model_parallel_size=2)),
    "DP2": ("mm1-tiny", {}),
    "EP2": ("mm1-tiny-moe", dict(expert_model_parallel_size=2)),
}
TRAINED = {
    "TP2 + SP": LAYOUTS["TP2 + SP"],
    "EP2": LAYOUTS["EP2"],
    "DP2, distributed optimizer": ("mm1-tiny", dict(use_distributed_optimizer=True)),
    "PP2 VPP2": ("mm1-tiny", dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "CP2": ("mm1-tiny", dict(context_parallel_size=2, vision_parallel_mode="data")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the task's pictures, which all workers share."""
    folder = tmp_path_factory.mktemp("words")
    NewWords(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(
        [f"Question: what is it? Short answer: {word}" for word in WORDS.values()] * 20, path, vocab_size=300
    )
    return path


@pytest.fixture(scope="module")
def model(pool, tokenizer, tmp_path_factory):
    """`model(preset)`: (configuration of one process, checkpoint of random weights)."""
    known = {}

    def get(name: str):
        if name not in known:
            config = with_data(preset(name), tokenizer=str(tokenizer), seq_length=192, max_images_per_sequence=16)
            config = jobs.with_parallel(lively(config))
            [checkpoint] = pool(1).run(jobs.save_initial, config, tmp_path_factory.mktemp(name))
            known[name] = config, checkpoint
        return known[name]

    return get


@pytest.mark.parametrize(("name", "sizes"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_task_has_the_same_outcomes_in_every_layout(pool, model, folder, name, sizes):
    config, checkpoint = model(name)
    [expected] = pool(1).run(evaluation_jobs.answer, config, checkpoint, folder)
    assert [len(outcomes) for outcomes in expected] == [11, 11, 11]
    for outcomes in expected:
        [refusal] = [one for one in outcomes if isinstance(one, Refusal)]
        assert "positions" in refusal.message
    for ranks in pool(2).run(evaluation_jobs.answer, jobs.with_parallel(config, **sizes), checkpoint, folder):
        for outcomes, alone in zip(ranks, expected, strict=True):
            assert [one for one in outcomes if isinstance(one, Refusal)] == [
                one for one in alone if isinstance(one, Refusal)
            ]
            pairs = [pair for pair in zip(outcomes, alone, strict=True) if not isinstance(pair[1], Refusal)]
            assert [one.raw for one, _ in pairs] == [other.raw for _, other in pairs]
            for one, other in pairs:
                assert len(one.scores) == 2
                assert [score.log_likelihood for score in one.scores] == pytest.approx(
                    [score.log_likelihood for score in other.scores], rel=1e-5
                )


def test_an_image_is_encoded_once(pool, model, folder):
    """Queries with 0 and 8 demonstrations, those exchanged, and candidates: all the same images."""
    config, checkpoint = model("mm1-tiny")
    config = with_data(config, seq_length=512)
    [(encoded, images)] = pool(1).run(evaluation_jobs.count_encoded, config, checkpoint, folder, shots=8)
    assert encoded == images > 30


@pytest.mark.parametrize("kept", [1])
@pytest.mark.parametrize("name", ["DP2", "TP2 + SP"])
def test_an_interrupted_evaluation_ends_in_the_same_files(pool, model, folder, tmp_path, name, kept):
    config, checkpoint = model("mm1-tiny")
    config = jobs.with_parallel(config, **LAYOUTS[name][1])
    pool(2).run(evaluation_jobs.interrupt_and_go_on, config, checkpoint, folder, tmp_path, kept=kept)
    for file in ("results.json", "items.jsonl"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert whole and (tmp_path / "resumed" / file).read_bytes() == whole


def test_a_model_in_training_is_asked_in_its_template(pool, model, folder):
    """As an engine is, of which others test what it does with a template."""
    config, checkpoint = model("mm1-tiny")
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} ANSWER:"
        "{% else %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    [(training, alone)] = pool(1).run(evaluation_jobs.letters, config, checkpoint, folder, template=template)
    assert training == alone and len(training) == 2 and training[0] != training[1]


@pytest.mark.parametrize(("name", "sizes"), TRAINED.values(), ids=TRAINED)
def test_training_does_not_notice_an_evaluation(pool, model, folder, name, sizes):
    """Losses, weights, optimizer, random numbers: equal to the bit."""
    config = jobs.with_parallel(model(name)[0], **sizes)
    for differing, places, figures in pool(2).run(evaluation_jobs.compare_training, config, folder):
        assert differing == []
        assert places > 50  # tensors of the rank with the fewest
        assert [set(one) for one in figures] == [set(figures[0])] * 3
        assert "words, 2 shots, images exchanged, exact_match" in figures[0]
        assert figures[0]["words, 0 shots, not answered"] == 1
