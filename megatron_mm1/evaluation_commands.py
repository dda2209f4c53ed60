"""`mm1 eval`; outside its room, which imports torch."""

import argparse
from pathlib import Path

from megatron_mm1.arguments import (
    add_chat,
    add_command,
    add_parallel_sizes,
    add_tokenizer,
    both_spellings,
    count,
    positive_int,
)


def add_evaluation_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluation = add_command(commands, "eval", evaluate, "evaluate a checkpoint")
    evaluation.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    evaluation.add_argument(
        "--task",
        required=True,
        action="append",
        metavar="NAME",
        help="built-in name or package.module.Class; repeatable",
    )
    evaluation.add_argument("--data", action="append", default=[], metavar="TASK=DIR", help="a task's data; repeatable")
    evaluation.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    evaluation.add_argument("--limit", type=positive_int, metavar="N", help="items per task at most")
    evaluation.add_argument(
        "--shots",
        type=count,
        nargs="+",
        default=[0],
        metavar="N",
        help="demonstrations in front of each item; several numbers are set side by side (0)",
    )
    evaluation.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of demonstrations (0)")
    evaluation.add_argument(
        "--control", action="store_true", help="evaluate again with the images of the demonstrations exchanged"
    )
    evaluation.add_argument(
        *both_spellings("high-resolution"),
        type=positive_int,
        metavar="PX",
        help="side of images, instead of what the model was trained with",
    )
    evaluation.add_argument(
        *both_spellings("high-resolution-shots"),
        type=count,
        metavar="N",
        help="of the demonstrations only the last N in --high-resolution, or cut into tiles (all)",
    )
    evaluation.add_argument(
        *both_spellings("image-tiling"),
        choices=("none", "overview_and_crops", "dynamic"),
        help="how images become tiles, instead of what the model was trained with",
    )
    evaluation.add_argument(
        *both_spellings("max-image-tiles"),
        type=positive_int,
        metavar="N",
        help="of a grid, instead of what a model of dynamic tiling was trained with",
    )
    evaluation.add_argument(
        *both_spellings("chain-of-thought"),
        action="store_true",
        help="demonstrations with their reasoning; the answer is taken out of the model's",
    )
    add_chat(evaluation)
    add_tokenizer(evaluation)
    add_parallel_sizes(evaluation)


def evaluate(args: argparse.Namespace) -> None:
    from megatron_mm1.evaluation.runner import evaluate_main

    evaluate_main(args)
