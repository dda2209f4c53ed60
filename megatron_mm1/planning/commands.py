"""`mm1 plan ..`: what a configuration would do, from a login node: no torch, no data and no process group."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mm1.arguments import FAILED, positive_int

if TYPE_CHECKING:
    from megatron_mm1.config import MM1Config


def add_plan_commands(plan: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """By name only: they take the configuration's keys too."""
    plan.add_parser("memory", help="device memory that a step takes on each rank (mm1 plan memory --help)")
    plan.add_parser("fp8", help="every matrix product of a rank: shape, recipe, padding (mm1 plan fp8 --help)")


def plan_memory(argv: Sequence[str]) -> int:
    """Prints the table; the exit code is 1 where `training.device_memory_gib` does not hold a rank."""
    args, config_arguments = build_plan_memory_parser().parse_known_args(argv)
    from megatron_mm1.planning.memory import memory_problem, plan_memory
    from megatron_mm1.planning.report import memory_json, memory_table

    config, world_size = _valid_config(config_arguments, args.world_size)
    plan = plan_memory(config, world_size=world_size)
    problem = memory_problem(config, plan)
    if args.json:
        print(memory_json(plan, problem))
    else:
        print(memory_table(plan, world_size=world_size))
        print("" if problem is None else f"\nwould be refused: {problem}\n", end="")
    return FAILED if problem else 0


def _valid_config(arguments: Sequence[str], world_size: int | None) -> tuple["MM1Config", int]:
    """The configuration, and how many processes it is for: None is as few as its layout takes."""
    from megatron_mm1.config.derived import smallest_world_size
    from megatron_mm1.config.loading import load_config
    from megatron_mm1.config.validation import validate

    config = load_config(arguments)
    world_size = world_size or smallest_world_size(config.parallel)
    validate(config, world_size=world_size)
    return config, world_size


def build_plan_memory_parser() -> argparse.ArgumentParser:
    """The options of `plan memory` itself; all others are the configuration's keys, as for `train`."""
    parser = argparse.ArgumentParser(
        prog="mm1 plan memory",
        description="Estimate the device memory that a training step takes on a rank at each place in the pipeline: "
        "weights, gradients, optimizer, activations of the microbatches in flight, logits, workspace. The exit code is "
        "1 where --training.device_memory_gib is given and one needs more. Further options are the configuration's, "
        "as for mm1 train (--preset, --tensor-model-parallel-size, ..).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size", "--world_size", type=positive_int, metavar="N", help="processes (as few as the layout takes)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of a table in GiB")
    return parser


def plan_fp8(argv: Sequence[str]) -> int:
    """Prints the table; the exit code is 1 where FP8 cannot run a product."""
    args, config_arguments = build_plan_fp8_parser().parse_known_args(argv)
    from megatron_mm1.planning.fp8 import fp8_problems
    from megatron_mm1.planning.gemms import rank_gemms
    from megatron_mm1.planning.report import gemm_json, gemm_table

    config, _ = _valid_config(config_arguments, args.world_size)
    gemms, problems = rank_gemms(config, images=args.images), fp8_problems(config)
    if args.json:
        print(gemm_json(gemms, problems))
    else:
        print(gemm_table(gemms, precision=config.training.precision))
        print("".join(f"\nillegal: {problem}" for problem in problems), end="\n" if problems else "")
    return FAILED if problems else 0


def build_plan_fp8_parser() -> argparse.ArgumentParser:
    """The options of `plan fp8` itself; all others are the configuration's keys, as for `train`."""
    parser = argparse.ArgumentParser(
        prog="mm1 plan fp8",
        description="List every matrix product with a weight that a rank runs for a microbatch: M positions times a "
        "weight [N, K], after tensor, sequence, context and expert parallelism; whether its recipe can run it, and how "
        "many rows are padding. The exit code is 1 where one cannot. Further options are the configuration's, as for "
        "mm1 train (--preset, --fp8.decoder_recipe, ..).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size",
        "--world_size",
        type=positive_int,
        metavar="N",
        help="processes to check the layout for (as few as it takes)",
    )
    parser.add_argument(
        "--images", type=positive_int, metavar="N", help="images in a microbatch (as many as it may have)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser
