"""The comparison with a blind model: what counts as better, and which runs may be compared."""

import dataclasses
import sys
from pathlib import Path

import pytest

from megatron_mm1.checkpoint.format import CheckpointMetadata, begin, commit
from megatron_mm1.config.presets import preset
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.bootstrap import Interval

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import blind_baseline
from goals import Goal, report

CONFIG = preset("mm1-tiny")


@pytest.mark.parametrize(
    ("value", "relation", "bound", "line"),
    [
        (0.67, "<", 1.31, "loss 0.67 nats goal <1.31 ok"),
        (1.31, "<", 1.31, "loss 1.31 nats goal <1.31 short"),
        (0.71, ">", 0.23, "loss 0.71 nats goal >0.23 ok"),
        (0.1, ">", 0.23, "loss 0.1 nats goal >0.23 short"),
        (float("nan"), ">", 0.23, "loss nan nats goal >0.23 short"),
        (float("nan"), "<", 0.23, "loss nan nats goal <0.23 short"),
    ],
)
def test_goal_line(value, relation, bound, line):
    assert str(Goal("loss", value, "nats", relation, bound)) == line


@pytest.mark.parametrize(("values", "code"), [([1, 1], 0), ([1, 3], 1), ([], 1)])
def test_exit_code(values, code, capsys):
    assert report({"steps": 5}, [Goal("g", value, "u", "<", 2) for value in values]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "steps: 5"
    assert lines[len(lines) - len(values) :] == [f"g {v} u goal <2 {'ok' if v < 2 else 'short'}" for v in values]


def interval(low: float, high: float) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high, count=100)


def figures(*, true=(0.6, 0.7), other=(1.2, 1.4), accuracy=(0.6, 0.8)):
    return {
        "demo_captions": {"all": {"loss_true_image": interval(*true), "loss_other_image": interval(*other)}},
        "demo_questions": {"shape or colour": {"accuracy": interval(*accuracy)}},
    }


BLIND = dict(true=(0.8, 0.9), other=(0.8, 0.9), accuracy=(0.2, 0.3))


@pytest.mark.parametrize(
    ("sighted", "short"),
    [
        ({}, []),
        ({"other": (0.65, 0.9)}, ["caption_loss_upper_vs_other_image"]),
        ({"true": (0.6, 0.85)}, ["caption_loss_upper_vs_blind"]),
        ({"accuracy": (0.3, 0.8)}, ["shape_or_colour_accuracy_lower_vs_blind"]),
    ],
)
def test_overlapping_intervals_fall_short(sighted, short):
    goals = blind_baseline.compare(figures(**sighted), figures(**BLIND))
    assert len(goals) == 3
    assert [goal.name for goal in goals if not goal.holds] == short


def save(run: Path, config, *, iteration: int) -> None:
    metadata = CheckpointMetadata(
        iteration=iteration,
        consumed_sequences=0,
        config=to_dict(config),
        tokenizer_fingerprint="t",
        plan_fingerprint="p",
    )
    commit(begin(run / "checkpoints", iteration), metadata, {})


@pytest.fixture
def launched(monkeypatch):
    commands = []
    monkeypatch.setattr(blind_baseline, "launch", lambda arguments, processes: commands.append(arguments[0]))
    return commands


def test_the_blind_run_differs_in_its_images_alone(tmp_path):
    blind = blind_baseline.blind_config(CONFIG, tmp_path)
    assert blind.data.text_only
    assert dataclasses.replace(blind, data=CONFIG.data, run_dir=CONFIG.run_dir) == CONFIG


@pytest.mark.parametrize(("iteration", "trained"), [(1500, []), (1000, ["train"]), (None, ["train"])])
def test_a_finished_blind_run_is_kept_and_another_goes_on(tmp_path, launched, iteration, trained):
    config = blind_baseline.blind_config(CONFIG, tmp_path)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=1500))
    if iteration is not None:
        save(tmp_path, config, iteration=iteration)
    blind_baseline.train_blind(config, processes=2)
    assert launched == trained


def test_a_blind_run_of_other_settings_is_refused(tmp_path, launched):
    config = blind_baseline.blind_config(CONFIG, tmp_path)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e-5))
    save(tmp_path, other, iteration=1500)
    with pytest.raises(UserError, match="other settings"):
        blind_baseline.train_blind(config, processes=2)
    assert not launched


def test_an_unfinished_run_is_not_compared(tmp_path):
    save(tmp_path, CONFIG, iteration=10)
    with pytest.raises(UserError, match=f"has taken 10 of {CONFIG.training.train_iters} steps"):
        blind_baseline.finished_config(tmp_path)


def test_a_missing_run_is_an_error_of_the_user(tmp_path, capsys):
    assert blind_baseline.main(["--sighted", str(tmp_path / "none"), "--blind", str(tmp_path / "blind")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
