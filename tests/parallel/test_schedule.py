"""Batch-size ramps and components that are frozen at first, in a run of the trainer; going on with another schedule."""

import dataclasses

import pytest

from megatron_mm1.config.schema import BatchSizeStage
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.training.resume import starting_point
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of
from tests.parallel.test_trainer import records

LAYOUTS = {
    "DP2, distributed optimizer": dict(use_distributed_optimizer=True),
    "PP2": dict(pipeline_model_parallel_size=2),
    "TP2, images shared out": dict(tensor_model_parallel_size=2, vision_parallel_mode="data"),
}
RAMP = (BatchSizeStage(until=2, global_batch_size=4),)
SIZES = [4, 4, 8, 8]
ACCEPT = dict(accept_other_schedule=True)

pytestmark = pytest.mark.demo


def user_config(run_dir, *, steps=4, checkpoint=(), optimizer=(), training=(), **sizes):
    """Two steps of 4 sequences and then steps of 8; the decoder begins in the third step, the tower in the second."""
    config = config_of("mm1-tiny", **sizes)
    training = dict(batch_size_ramp=RAMP, frozen_steps={"tower": 1, "decoder": 2}) | dict(training)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        training=dataclasses.replace(config.training, train_iters=steps, eval_interval=0, **training),
        optimizer=dataclasses.replace(config.optimizer, lr_decay_iters=10, connector_lr=1e-3, **dict(optimizer)),
        checkpoint=dataclasses.replace(config.checkpoint, **dict(checkpoint)),
        logging=dataclasses.replace(config.logging, log_interval=1),
    )


@pytest.fixture(scope="module")
def weights(pool, demo_corpus, tmp_path_factory):
    """Settings that start from the same weights in every layout."""
    [start] = pool(1).run(jobs.save_initial, config_of("mm1-tiny"), tmp_path_factory.mktemp("start"))
    return dict(load=str(start.parent), finetune=True)


@pytest.fixture(scope="module")
def alone(pool, weights, tmp_path_factory):
    """The four steps in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    pool(1).run(jobs.train_as_users_do, user_config(run_dir, checkpoint=weights))
    return records(run_dir, "train")


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("global_batch_size", "consumed_samples", "learning_rate", "learning_rate tower"):
            assert ours[name] == theirs[name], name


def test_batches_grow_and_components_begin_when_the_settings_say(alone):
    assert [record["global_batch_size"] for record in alone] == SIZES
    assert [record["consumed_samples"] for record in alone] == [4, 8, 16, 24]
    for component, frozen in {"tower": 1, "connector": 0, "decoder": 2}.items():
        norms = [record[f"grad_norm {component}"] for record in alone]
        assert norms[:frozen] == [0] * frozen and min(norms[frozen:]) > 0
    assert [record["learning_rate"] for record in alone][:2] == [0, 0]
    # warm-up of a step of 4 sequences, a cosine over 2 x 4 + 8 x 8 sequences
    assert alone[1]["learning_rate tower"] == pytest.approx(3e-3) and alone[2]["learning_rate"] < 3e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ramp_is_the_same_in_every_layout(pool, weights, alone, tmp_path, layout):
    pool(2).run(jobs.train_as_users_do, user_config(tmp_path, checkpoint=weights, **LAYOUTS[layout]))
    assert_same(records(tmp_path, "train"), alone)


def test_a_run_that_stops_in_its_ramp_goes_on_as_if_it_had_not(pool, weights, alone, tmp_path):
    pool(2).run(jobs.train_as_users_do, user_config(tmp_path, steps=1, checkpoint=weights))
    pool(1).run(jobs.train_as_users_do, user_config(tmp_path, steps=4))
    assert_same(records(tmp_path, "train"), alone)


@pytest.fixture(scope="module")
def stopped(pool, weights, tmp_path_factory):
    """The folder of a run that stopped after three steps, of 4, 4 and 8 sequences."""
    run_dir = tmp_path_factory.mktemp("stopped")
    pool(1).run(jobs.train_as_users_do, user_config(run_dir, steps=3, checkpoint=weights))
    return run_dir


def start(config):
    return starting_point(config, open_tokenizer(config.data.tokenizer))


def test_another_schedule_is_refused_unless_it_is_accepted(stopped):
    changed = dict(optimizer=dict(lr=1e-3), training=dict(output_z_loss_coeff=1e-4))
    sentences = ("optimizer.lr was 0.003 and is 0.001", "training.output_z_loss_coeff was 0.0 and is 0.0001")
    with pytest.raises(UserError) as refused:
        start(user_config(stopped, **changed))
    for sentence in sentences:
        assert f"{sentence}: use the same, go on all the same (--checkpoint.accept_other_schedule" in str(refused.value)
    assert sorted(start(user_config(stopped, **changed, checkpoint=ACCEPT)).changes) == sorted(sentences)


def test_steps_that_were_taken_keep_their_batch_sizes(stopped):
    larger = user_config(stopped, training=dict(global_batch_size=16), checkpoint=ACCEPT)
    with pytest.raises(UserError, match=r"its 3 steps took 16 sequences, .* would have taken 24: ") as refused:
        start(larger)
    ramp = "[{'until': 2, 'global_batch_size': 4}, {'until': 3, 'global_batch_size': 8}]"
    assert f"--training.batch_size_ramp '{ramp}'" in str(refused.value)


def test_adafactor_does_not_go_on_from_adams_state(stopped):
    other = user_config(stopped, optimizer=dict(optimizer="adafactor"), checkpoint=ACCEPT)
    with pytest.raises(UserError, match=r"optimizer\.optimizer was adamw and is adafactor: use the same, or start"):
        start(other)


def test_an_accepted_schedule_holds_from_the_next_step_on(pool, stopped):
    ramp = (*RAMP, BatchSizeStage(until=3, global_batch_size=8))
    training = dict(global_batch_size=16, batch_size_ramp=ramp)
    changed = user_config(stopped, training=training, optimizer=dict(lr=1e-3), checkpoint=ACCEPT)
    pool(1).run(jobs.train_as_users_do, changed)
    last = records(stopped, "train")[-1]
    assert (last["iteration"], last["consumed_samples"], last["global_batch_size"]) == (4, 32, 16)
    assert 5e-4 < last["learning_rate"] < 1e-3
