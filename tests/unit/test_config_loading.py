"""Configurations from presets, YAML and the command line: what parses, what wins, and what each mistake is told."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mm1.config.keys import all_keys, value_at
from megatron_mm1.config.loading import from_dict, from_yaml, load_config, to_dict, to_yaml
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.schema import MM1Config, MoEConfig, SourceConfig
from megatron_mm1.errors import ConfigError

TINY = ["--preset", "mm1-tiny"]


def problems(argv: list[str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_config(argv)
    return raised.value.problems


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_and_dict_round_trip(name: str) -> None:
    config = preset(name)
    assert from_yaml(to_yaml(config)) == config
    assert from_dict(to_dict(config)) == config


def test_dict_is_plain_data() -> None:
    assert yaml.safe_load(yaml.safe_dump(to_dict(preset("mm1-3b-moe")))) == to_dict(preset("mm1-3b-moe"))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_as_it_is(name: str) -> None:
    assert load_config(["--preset", name]) == preset(name)


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--parallel.tensor_model_parallel_size", "4"], "parallel.tensor_model_parallel_size", 4),
        (["--parallel.tensor-model-parallel-size=4"], "parallel.tensor_model_parallel_size", 4),
        (["--tensor-model-parallel-size", "4"], "parallel.tensor_model_parallel_size", 4),
        (["--tensor_model_parallel_size=4"], "parallel.tensor_model_parallel_size", 4),
        (["--lr", "1e-4"], "optimizer.lr", 1e-4),
        (["--optimizer.vision_lr", "3"], "optimizer.vision_lr", 3.0),
        (["--optimizer.lr_decay_iters", "null"], "optimizer.lr_decay_iters", None),
        (["--model.vision.feature_layer", "-2"], "model.vision.feature_layer", -2),
        (["--sequence-parallel"], "parallel.sequence_parallel", True),
        (["--sequence-parallel", "--lr", "1"], "parallel.sequence_parallel", True),
        (["--model.vision.class_token", "false"], "model.vision.class_token", False),
        (["--name", "12"], "name", "12"),
        (["--checkpoint.load", "runs/a"], "checkpoint.load", "runs/a"),
        (["--model.vision.image_mean", "[0, 0.5, 1]"], "model.vision.image_mean", (0.0, 0.5, 1.0)),
        (["--model.connector.options", "{depth: 3}"], "model.connector.options", {"depth": 3}),
        (["--data.sources", "[{name: a, path: b}]"], "data.sources", (SourceConfig(name="a", path="b"),)),
        (
            ["--model.moe", "{num_moe_experts: 4, moe_layer_freq: 2}"],
            "model.moe",
            MoEConfig(num_moe_experts=4, moe_layer_freq=2),
        ),
        (
            ["--num-moe-experts", "4", "--moe-layer-freq", "1"],
            "model.moe",
            MoEConfig(num_moe_experts=4, moe_layer_freq=1),
        ),
        (
            ["--moe-layer-freq", "1", "--model.moe", "{num_moe_experts: 4, moe_layer_freq: 2}"],
            "model.moe",
            MoEConfig(num_moe_experts=4, moe_layer_freq=1),
        ),
    ],
)
def test_an_override_sets_its_key_and_no_other(arguments: list[str], key: str, value: Any) -> None:
    config = load_config([*TINY, *arguments])
    assert value_at(config, key) == value
    changed = {path for path in all_keys() if value_at(config, path) != value_at(preset("mm1-tiny"), path)}
    assert key in changed or value is None
    assert all(path == key or path.startswith(f"{key}.") or path == "optimizer.lr" for path in changed)


def test_experts_can_be_taken_from_a_preset() -> None:
    assert load_config(["--preset", "mm1-tiny-moe", "--model.moe", "null"]).model.moe is None


def test_later_files_override_earlier_ones_and_options_override_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("preset: mm1-tiny\ntraining: {train_iters: 1, eval_iters: 2, seed: 3}\n")
    second.write_text("training:\n  eval_iters: 20\n  seed: 30\ndata:\n  sources: [{name: a, path: b, weight: 2}]\n")
    config = load_config(["--config", str(first), "--config", str(second), "--training.seed", "300"])
    training = config.training
    assert (training.train_iters, training.eval_iters, training.seed) == (1, 20, 300)
    assert config.data.sources == (SourceConfig(name="a", path="b", weight=2.0),)
    assert config.model == preset("mm1-tiny").model


def test_an_option_chooses_another_preset_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("preset: mm1-tiny\nname: mine\n")
    config = load_config(["--preset", "mm1-3b", "--config", str(tmp_path / "run.yaml")])
    assert config.model == preset("mm1-3b").model and config.name == "mine"


def test_files_with_different_presets_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("mm1-3b", "mm1-7b"):
        (tmp_path / name).write_text(f"preset: {name}\n")
    (message,) = problems(["--config", str(tmp_path / "mm1-3b"), "--config", str(tmp_path / "mm1-7b")])
    assert "different presets" in message and "--preset" in message


def test_print_config_prints_what_loads_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_config([*TINY, "--training.seed", "7", "--print_config"])
    assert exit_.value.code == 0
    config = from_yaml(capsys.readouterr().out)
    assert config == load_config([*TINY, "--training.seed", "7"])


def test_help_has_every_key_and_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert not [key.path for key in all_keys().values() if f"--{key.path} " not in text]
    assert "Positions per sequence [P]." in text


def test_help_after_a_preset_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--preset", "mm1-30b", "--help"])
    assert "--model.decoder.num_layers int (48)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--parallel.pipline_model_parallel_size", "2"],
            "unknown option --parallel.pipline_model_parallel_size; "
            "did you mean 'parallel.pipeline_model_parallel_size'?",
        ),
        (["--optimiser.lr", "1"], "unknown option --optimiser.lr; did you mean 'optimizer.lr'?"),
        (["--vision.image_size", "1"], "unknown option --vision.image_size; did you mean 'model.vision.image_size'?"),
        (["--presets", "1"], "unknown option --presets; did you mean 'preset'?"),
        (
            ["--num_layers", "3"],
            "--num_layers is ambiguous: use one of --model.decoder.num_layers, --model.vision.num_layers, "
            "--model.connector.num_layers",
        ),
        (["--optimizer.lr", "fast"], "optimizer.lr is 'fast', which is not float"),
        (["--training.train_iters", "1.5"], "training.train_iters is '1.5', which is not int"),
        (["--training.precision", "fp64"], "training.precision is 'fp64', which is not bf16|fp32"),
        (["--sequence-parallel", "maybe"], "parallel.sequence_parallel is 'maybe', which is not bool"),
        (["--logging.progress_bar", "3"], "logging.progress_bar is '3', which is not bool or null"),
        (["--image_mean", "[1, 2]"], "model.vision.image_mean is '[1, 2]', which is not a list of 3 floats"),
        (["--num_moe_experts", "4"], "model.moe.moe_layer_freq is missing: it has no default"),
        (["--data.sources", "a"], "data.sources is 'a', which is not a list of {name, path, weight, max_epochs}"),
        (["--lr"], "argument --optimizer.lr: expected one argument"),
        (["mm1-3b"], "'mm1-3b' belongs to no option"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_with_the_fix(arguments: list[str], message: str) -> None:
    assert problems([*TINY, *arguments]) == (message,)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--tp-comm-overlap"], "unknown option --tp_comm_overlap: tensor-parallel communication overlapped"),
        (["--cuda_graph_impl", "local"], "unknown option --cuda_graph_impl: CUDA graphs"),
        (["--moe_token_dispatcher_type", "flex"], "is 'flex', which is not alltoall|allgather: DeepEP"),
    ],
)
def test_what_was_never_run_on_a_gpu_is_refused_by_name(arguments: list[str], what: str) -> None:
    (problem,) = problems(["--preset", "mm1-tiny-moe", *arguments])
    assert what in problem and problem.endswith(
        "not run on a GPU with this model yet, and not offered until then: leave it out"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parallel: {tensor_model_parallel_sise: 2}", "did you mean 'parallel.tensor_model_parallel_size'?"),
        ("seq_length: 128", "unknown key 'seq_length'; did you mean 'data.seq_length'?"),
        ("data: {sources: [{name: a, path: b, wieght: 3}]}", "did you mean 'data.sources[0].weight'?"),
        ("data: {sources: [{name: a}]}", "data.sources[0].path is missing: it has no default"),
        ("data: {sources: [3]}", "data.sources[0] is 3, which is not {name, path, weight, max_epochs}"),
        (
            "data: {sources: {name: a}}",
            "data.sources is {'name': 'a'}, which is not a list of {name, path, weight, max_epochs}",
        ),
        ("training: {train_iters: true}", "training.train_iters is True, which is not int"),
        ("training: {train_iters: null}", "training.train_iters is None, which is not int"),
        ("name: 3", "name is 3, which is not str"),
        ("training: 3", "training is 3, which is not {micro_batch_size, "),
        ("optimizer: null", "optimizer is None, which is not {lr, "),
        ("model: {moe: {num_moe_experts: 4}}", "model.moe.moe_layer_freq is missing"),
        ("[1, 2]", "holds [1, 2], not a mapping"),
        ("a: [1", "is not YAML"),
        ("preset: mm1-4b", "unknown preset 'mm1-4b'"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    arguments = [] if text.startswith("preset") else TINY
    found = problems([*arguments, "--config", str(file)])
    assert len(found) == 1 and message in found[0]


def test_all_mistakes_are_told_at_once() -> None:
    found = problems([*TINY, "--lr", "x", "--training.seed", "y", "--data.sources", "[{name: a, pat: b}]"])
    assert len(found) == 4


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (message,) = problems(["--config", str(tmp_path / "none.yaml")])
    assert "cannot read the configuration file" in message and "none.yaml" in message


def test_nothing_named() -> None:
    (message,) = problems([])
    assert "--preset" in message and "--config" in message


def test_a_file_without_a_preset_must_be_whole(tmp_path: Path) -> None:
    whole, partial = tmp_path / "whole.yaml", tmp_path / "partial.yaml"
    whole.write_text(to_yaml(preset("mm1-tiny")))
    partial.write_text("name: mine\n")
    assert load_config(["--config", str(whole)]) == preset("mm1-tiny")
    assert problems(["--config", str(partial)]) == (
        "model is missing: it has no default",
        "optimizer is missing: it has no default",
    )


def test_configuration_and_planning_import_no_torch() -> None:
    """They run on a login node, and a typing mistake is told without a wait."""
    modules = "megatron_mm1.config.loading, megatron_mm1.config.validation, megatron_mm1.planning.report"
    code = f"import sys, {modules}, megatron_mm1.planning.pipeline, megatron_mm1.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_key_of_the_schema_can_be_read() -> None:
    config: MM1Config = preset("mm1-tiny-moe")
    assert value_at(config, "model.moe.num_moe_experts") == 4
    assert value_at(preset("mm1-tiny"), "model.moe.num_moe_experts") is None
