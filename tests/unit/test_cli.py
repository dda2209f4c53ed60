"""The `mm1` command: what each subcommand calls, and what a user's mistake looks like from outside."""

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_mm1.cli import main
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.recipes import RECIPES
from megatron_mm1.data.prepared import Manifest
from megatron_mm1.errors import ConfigError, UserError


class Calls(list):
    """What a stand-in for a subcommand's implementation was called with; it returns `result`."""

    result: dict[str, Any] = {"documents": 3}  # noqa: RUF012

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.append((args, kwargs))
        return self.result

    @property
    def only(self) -> tuple[tuple, dict]:
        (call,) = self
        return call

    @property
    def namespace(self) -> dict[str, Any]:
        (args,) = self.only[0]
        assert isinstance(args, argparse.Namespace)
        return {name: value for name, value in vars(args).items() if name != "command"}


NO_SIZES = {f"{dimension}_model_parallel_size": None for dimension in ("tensor", "pipeline", "expert")}
NO_CHAT = {"chat": False, "chat_template": None, "tokenizer": None}


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> Calls:
    calls = Calls()
    double = ModuleType(module)
    setattr(double, function, calls)
    monkeypatch.setitem(sys.modules, module, double)
    return calls


def raise_(error: BaseException) -> Any:
    def function(*args: Any, **kwargs: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize("command", [["--help"], ["config", "--help"], ["train", "--help"]])
def test_help_names_presets_and_recipes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for names in (PRESETS, RECIPES):
        assert ", ".join(names) in shown


def test_train_hands_over_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.training.trainer", "train")
    assert main(["train", "--preset", "mm1-tiny"]) == 0
    assert calls.only == ((preset("mm1-tiny"),), {"evaluation": None})


def test_train_brings_the_evaluation_that_the_configuration_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.training.trainer", "train")
    building = stand_in(monkeypatch, "megatron_mm1.evaluation.in_training", "live_evaluation")
    building.result = "evaluation"
    assert main(["train", "--preset", "mm1-tiny", "--evaluation.interval", "5", "--evaluation.tasks", "[a]"]) == 0
    assert calls.only[1] == {"evaluation": "evaluation"}
    assert building.only[0] == calls.only[0]


def test_data_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.data.demo", "build_demo_corpus")
    documents = {"train": {"documents": 3000}, "validation": {"documents": 7}}
    calls.result = {"counts": {"captions": documents}}
    assert main(["data", "demo", "--output", "here", "--seed", "3"]) == 0
    assert "captions       3,000 documents to train on, 7 held out" in capsys.readouterr().out
    assert calls.only == ((Path("here"),), {"seed": 3})


def test_data_prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.data.prepare", "prepare_main")
    calls.result = Manifest(
        counts={"documents": 3000},
        records={"read": 3002, "written": 3000, "rejected": {"blank text": 2}},
        images={"seen": 5, "written": 4, "dropped": {"not an image": 1}},
        tokenizer="",
        origin={},
        parts=(),
    )
    options = ["--reader", "own.Reader", "--input", "in", "--tokenizer", "t.model", "--output", "out"]
    assert main(["data", "prepare", *options, "--option", "a=1", "--option", "b=2", "--workers", "3"]) == 0
    assert calls.namespace == {
        "reader": "own.Reader",
        "input": Path("in"),
        "tokenizer": Path("t.model"),
        "output": Path("out"),
        "option": ["a=1", "b=2"],
        "workers": 3,
        "part_size": None,
        "max_bad_fraction": 0.1,
        "image_check": "decode",
        "no_filters": False,
        "max_repeats": None,
    }
    assert capsys.readouterr().out.splitlines() == [
        "documents: 3,000",
        "records: 3,002 read, 3,000 written",
        "  left out, blank text: 2",
        "images of those: 5 seen, 4 written",
        "  left out, not an image: 1",
    ]


@pytest.mark.parametrize("value", ["nan", "-0.1", "1.5", "many"])
def test_data_prepare_takes_a_share_of_bad_records(capsys: pytest.CaptureFixture[str], value: str) -> None:
    options = ["--reader", "text", "--input", "in", "--tokenizer", "t.model", "--output", "out"]
    with pytest.raises(SystemExit):
        main(["data", "prepare", *options, f"--max-bad-fraction={value}"])
    assert f"{value!r} is no share: use 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--workers", "--part-size"])
def test_data_prepare_takes_counts(capsys: pytest.CaptureFixture[str], option: str) -> None:
    options = ["--reader", "text", "--input", "in", "--tokenizer", "t.model", "--output", "out"]
    with pytest.raises(SystemExit):
        main(["data", "prepare", *options, option, "0"])
    assert "'0' is not a positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tensor-model-parallel-size", "--tensor_model_parallel_size"])
def test_eval(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.evaluation.runner", "evaluate_main")
    options = ["--checkpoint", "c", "--task", "a", "--task", "own.Task", "--output", "o", "--limit", "9"]
    presented = [
        "--shots",
        "0",
        "8",
        "--high-resolution",
        "672",
        "--high-resolution-shots",
        "3",
        "--max-image-tiles",
        "16",
        "--chain_of_thought",
        "--data",
        "a=d",
    ]
    assert main(["eval", *options, *presented, option, "2"]) == 0
    assert calls.namespace == {
        "checkpoint": Path("c"),
        "task": ["a", "own.Task"],
        "output": Path("o"),
        "limit": 9,
        "data": ["a=d"],
        "shots": [0, 8],
        "seed": 0,
        "control": False,
        "high_resolution": 672,
        "high_resolution_shots": 3,
        "image_tiling": None,
        "max_image_tiles": 16,
        "chain_of_thought": True,
        **NO_CHAT,
        **NO_SIZES,
        "tensor_model_parallel_size": 2,
    }


def test_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.inference.caption", "caption_main")
    options = ["--image", "a.png", "b.png", "--image", "d.png", "--max_new_tokens", "5"]
    assert main(["caption", "--checkpoint", "c", *options]) == 0
    images = [Path("a.png"), Path("b.png"), Path("d.png")]
    assert calls.namespace == {"checkpoint": Path("c"), "image": images, "max_new_tokens": 5, **NO_CHAT, **NO_SIZES}


def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.inference.ask", "generate_main")
    calls.result = 0
    options = [
        "--image",
        "a.png",
        "b.png",
        "--prompt",
        "x",
        "--stop",
        ".",
        ";",
        "--top_k",
        "5",
        "--max-new-tokens",
        "7",
    ]
    assert main(["generate", "--checkpoint", "c", *options]) == 0
    assert calls.namespace == {
        "checkpoint": Path("c"),
        "prompt": "x",
        "input": None,
        "image": [Path("a.png"), Path("b.png")],
        "output": None,
        "max_new_tokens": 7,
        "stop": [".", ";"],
        "temperature": 0.0,
        "top_k": 5,
        "top_p": 1.0,
        "seed": 0,
        "batch_size": 64,
        **NO_CHAT,
        **NO_SIZES,
    }


def test_score(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "megatron_mm1.inference.ask", "score_main")
    calls.result = 0
    assert main(["score", "--checkpoint", "c", "--input", "i.jsonl", "--output", "o.jsonl", "--batch-size", "3"]) == 0
    files = {"checkpoint": Path("c"), "input": Path("i.jsonl"), "output": Path("o.jsonl")}
    assert calls.namespace == {**files, "batch_size": 3, **NO_CHAT, **NO_SIZES}


def test_config_presets_lists_the_papers_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "presets"]) == 0
    assert "mm1-30b" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert "megatron-core 0.19" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (UserError("no corpus at here: run mm1 data demo"), "mm1: error: no corpus at here: run mm1 data demo\n"),
        (ConfigError(["only one"]), "mm1: error: only one\n"),
        (ConfigError(["one", "two"]), "mm1: error: 2 problems in the configuration:\n  - one\n  - two\n"),
    ],
)
def test_user_error_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: UserError, report: str
) -> None:
    stand_in(monkeypatch, "megatron_mm1.training.trainer", "train")
    monkeypatch.setattr(sys.modules["megatron_mm1.training.trainer"], "train", raise_(error))
    assert main(["train", "--preset", "mm1-tiny"]) == 2
    assert capsys.readouterr() == ("", report)


@pytest.mark.parametrize(
    ("environment", "reports"),
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_one_rank_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], reports: bool
) -> None:
    monkeypatch.setattr("megatron_mm1.cli.GRACE_SECONDS", 0)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--preset", "mm1-tin"]) == 2
    assert ("did you mean 'mm1-tiny'" in capsys.readouterr().err) is reports


def test_an_error_of_one_rank_alone_is_reported_after_a_grace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = Calls()
    monkeypatch.setattr("megatron_mm1.cli.time.sleep", waits)
    monkeypatch.setenv("RANK", "3")
    stand_in(monkeypatch, "megatron_mm1.training.trainer", "train")
    monkeypatch.setattr(sys.modules["megatron_mm1.training.trainer"], "train", raise_(UserError("no corpus")))
    assert main(["train", "--preset", "mm1-tiny"]) == 2
    assert waits.only == ((10,), {})
    assert capsys.readouterr().err == "mm1: error on rank 3: no corpus\n"


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, "megatron_mm1.training.trainer", "train")
    monkeypatch.setattr(sys.modules["megatron_mm1.training.trainer"], "train", raise_(KeyboardInterrupt()))
    assert main(["train", "--preset", "mm1-tiny"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "megatron_mm1.training.trainer", "train")
    monkeypatch.setattr(sys.modules["megatron_mm1.training.trainer"], "train", raise_(RuntimeError("defect")))
    with pytest.raises(RuntimeError, match="defect"):
        main(["train", "--preset", "mm1-tiny"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required"),
        ("trian", "invalid choice"),
        ("eval --checkpoint c --output o", "--task"),
        ("eval --checkpoint c --output o --task a --limit 0", "'0' is not a positive whole number"),
        ("eval --checkpoint c --output o --task a --shots -1", "'-1' is not 0 or a positive whole number"),
        ("caption --checkpoint c", "--image"),
    ],
)
def test_misuse_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_python_m() -> None:
    result = run(sys.executable, "-m", "megatron_mm1", "train", "--preset", "mm1-tiny", "--print_config")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("name: mm1-tiny\n")
    assert run(sys.executable, "-m", "megatron_mm1", "train", "--presett", "x").returncode == 2


def test_torchrun_m_reports_an_error_once() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run(*torchrun, "-m", "megatron_mm1", "train", "--preset", "mm1-tin")
    assert result.returncode != 0
    assert result.stderr.count("mm1: error: unknown preset 'mm1-tin'") == 1
    assert "exitcode  : 2" in result.stderr  # rank 0's: it was not cut off by the others
