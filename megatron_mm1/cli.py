"""The `mm1` command. Each subcommand imports what it needs when it runs, so that the rest starts without torch."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import megatron_mm1
from megatron_mm1.arguments import FAILED, add_command, positive_int, share
from megatron_mm1.checkpoint.commands import convert
from megatron_mm1.config.presets import PRESETS
from megatron_mm1.config.recipes import RECIPES
from megatron_mm1.data.commands import add_data_commands, data_inspect
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.evaluation_commands import add_evaluation_commands
from megatron_mm1.inference_commands import add_inference_commands
from megatron_mm1.migration.commands import add_from_megatron
from megatron_mm1.planning.commands import add_plan_commands, plan_fp8, plan_memory

USER_ERROR = 2
INTERRUPTED = 130
ENDED_BY_SIGNAL = 75
"""Exit code of a training that a signal ended early, with a checkpoint: start it again (sysexits' EX_TEMPFAIL)."""
_NAMES = f"Presets (--preset): {', '.join(PRESETS)}. Recipes (--recipe): {', '.join(RECIPES)}."
GRACE_SECONDS = 10
"""How long the other ranks leave the report of an error to rank 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (None: this process's) and returns the exit code: 2 for a `UserError`, which it prints."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        _report(error, rank=_rank())
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(argv: list[str]) -> int:
    # The configuration owns the options of `train`, which argparse's subcommands could not pass on as they are.
    if argv[:1] == ["train"]:
        return train(argv[1:])
    if argv[:1] == ["parity"]:
        return parity(argv[1:])
    if argv[:2] == ["bench", "step"]:
        bench_step(argv[2:])
        return 0
    if argv[:2] == ["data", "inspect"]:
        data_inspect(argv[2:])
        return 0
    if argv[:1] == ["convert"]:
        return convert(argv[1:])
    if argv[:2] == ["plan", "memory"]:
        return plan_memory(argv[2:])
    if argv[:2] == ["plan", "fp8"]:
        return plan_fp8(argv[2:])
    args = build_parser().parse_args(argv)
    return args.command(args) or 0


def train(argv: Sequence[str]) -> int:
    from megatron_mm1.config.loading import load_config

    config = load_config(argv)
    evaluation = None
    if config.evaluation.interval:
        from megatron_mm1.evaluation.in_training import live_evaluation

        evaluation = live_evaluation(config)
    from megatron_mm1.training.trainer import train

    return 0 if train(config, evaluation=evaluation) else ENDED_BY_SIGNAL


def parity(argv: Sequence[str]) -> int:
    args, config_arguments = build_parity_parser().parse_known_args(argv)
    from megatron_mm1.parity.harness import parity_main

    return 0 if parity_main(args, config_arguments) else FAILED


def bench_step(argv: Sequence[str]) -> None:
    args, config_arguments = build_bench_step_parser().parse_known_args(argv)
    from megatron_mm1.bench.step import bench_step_main

    bench_step_main(args, config_arguments)


def health(args: argparse.Namespace) -> int:
    from megatron_mm1.parallel.health import health_main

    return 0 if health_main(least_share=args.least_share) else FAILED


def config_presets(args: argparse.Namespace) -> None:
    from megatron_mm1.planning.report import presets_table

    print(presets_table())


def doctor(args: argparse.Namespace) -> int:
    from megatron_mm1.doctor.report import doctor_main

    return doctor_main(args)


def report(args: argparse.Namespace) -> None:
    from megatron_mm1.report.page import report_main

    report_main(args)


def print_version(args: argparse.Namespace) -> None:
    print("megatron_mm1", megatron_mm1.__version__)
    for package in ("megatron-core", "torch"):
        print(package, version(package))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand but `train`, whose options are the configuration's keys."""
    parser = argparse.ArgumentParser(
        prog="mm1", description="Train MM1-style multimodal models on megatron-core.", epilog=_NAMES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a model (mm1 train --help lists every setting)")
    commands.add_parser("parity", help="show that every parallel layout computes the same (mm1 parity --help)")
    bench = commands.add_parser("bench", help="measure speed").add_subparsers(required=True, metavar="COMMAND")
    bench.add_parser("step", help="of a training step, and of its parts (mm1 bench step --help)")

    data = commands.add_parser("data", help="prepare training data").add_subparsers(required=True, metavar="COMMAND")
    add_data_commands(data)

    add_evaluation_commands(commands)
    add_inference_commands(commands)
    commands.add_parser("convert", help="import, export and change checkpoints (mm1 convert --help)")

    checkup = add_command(commands, "health", health, "measure every node of a job, and name those that are unfit")
    checkup.add_argument(
        "--least-share",
        "--least_share",
        type=share,
        default=0.75,
        metavar="X",
        help="a node with less than this share of the median of a rate is unfit (%(default)s)",
    )

    plan = commands.add_parser("plan", help="see ahead what a run would do").add_subparsers(
        required=True, metavar="COMMAND"
    )
    add_plan_commands(plan)

    configuring = commands.add_parser("config", help="look at configurations", epilog=_NAMES)
    config = configuring.add_subparsers(required=True, metavar="COMMAND")
    add_command(config, "presets", config_presets, "list the presets with their parameter counts beside the paper's")
    add_from_megatron(config)
    _add_doctor(commands)
    reporting = add_command(commands, "report", report, "write a run's logs and evaluations as one HTML page")
    reporting.add_argument("run", type=Path, metavar="RUN", help="its folder (run_dir)")
    reporting.add_argument("--output", type=Path, metavar="FILE", help="(report.html in the folder)")
    add_command(commands, "version", print_version, "print the versions that matter")
    return parser


def build_parity_parser() -> argparse.ArgumentParser:
    """The options of `parity` itself; all others are the configuration's keys, as for `train`."""
    parser = argparse.ArgumentParser(
        prog="mm1 parity",
        description="Run the same batches in many parallel layouts and compare loss, gradient norm, the gradient of "
        "every parameter and an update with one process. Further options are the configuration's, as for mm1 train "
        "(--preset, --model.decoder.num_layers, ..): the model to compare.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--layouts", default="pairs", metavar="all|pairs|NAME,..", help="all, or few that cover every pair of sizes"
    )
    parser.add_argument(
        "--world-size",
        "--world_size",
        type=positive_int,
        metavar="N",
        help="processes at most (the number of GPUs; without one 2)",
    )
    parser.add_argument("--batches", default="all", metavar="all|NAME,..", help="kinds of batch (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=2, metavar="N", help="gradient steps (%(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="relative error that passes; of the loss a tenth of it (%(default)s, for float32)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/parity"), metavar="DIR", help="folder for the report (%(default)s)"
    )
    return parser


def build_bench_step_parser() -> argparse.ArgumentParser:
    """The options of `bench step` itself; all others are the configuration's keys, as for `train`."""
    parser = argparse.ArgumentParser(
        prog="mm1 bench step",
        description="Time training steps, then take as many apart: waiting for data, tower, decoder, pipeline bubble, "
        "collectives, optimizer. Start it like mm1 train: alone, with torchrun or srun. Further options are the "
        "configuration's (--preset, --model.decoder.num_layers, ..). Weights are drawn, or loaded with "
        "--checkpoint.load; there is no validation, and nothing but the report is written.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=positive_int, default=10, metavar="N", help="that count (%(default)s)")
    parser.add_argument("--warmup", type=positive_int, default=3, metavar="N", help="steps before (%(default)s)")
    parser.add_argument(
        "--synthetic",
        nargs="?",
        const="mixed",
        metavar="KIND",
        help="random batches instead of the configured data: mixed, or another kind that mm1 parity has",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), metavar="DIR", help="folder for the report (%(default)s)"
    )
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctoring = add_command(commands, "doctor", doctor, "print what this machine can run, and what it lacks")
    doctoring.add_argument(
        "--for",
        dest="purpose",
        choices=("quickstart", "train", "gpu"),
        default="quickstart",
        help="what decides over the exit code: the quickstart, training on other data, or on GPUs (%(default)s)",
    )
    doctoring.add_argument("--json", action="store_true", help="the same for programs")
    doctoring.add_argument(
        "--run-dir", "--run_dir", type=Path, default=Path("runs"), metavar="DIR", help="disk to look at (%(default)s)"
    )
    doctoring.add_argument(
        "--corpus", type=Path, default=Path(".cache/demo-corpus"), metavar="DIR", help="demo corpus (%(default)s)"
    )
    doctoring.add_argument(
        "--timeout", type=positive_int, default=60, metavar="SECONDS", help="limit of each look (%(default)s)"
    )


def _report(error: UserError, *, rank: int) -> None:
    """Prints the error: once, although every rank may have met it.

    A launcher ends all ranks as soon as one has failed, so the others wait for rank 0 to have its say. One that is
    still there after that met an error of its own (a file that only its machine lacks), unless it is one of the
    configuration, which all share.
    """
    if rank == 0:
        print(f"mm1: error: {_describe(error)}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_SECONDS)
    if not isinstance(error, ConfigError):
        print(f"mm1: error on rank {rank}: {_describe(error)}", file=sys.stderr, flush=True)


def _describe(error: UserError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n  - ".join([f"{len(error.problems)} problems in the configuration:", *error.problems])
    return str(error)


def _rank() -> int:
    """This process's rank as torchrun or srun sets it; 0 on its own."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
