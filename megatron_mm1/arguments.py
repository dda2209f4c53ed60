"""What the parsers of the commands have in common."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

FAILED = 1
"""Exit code of a check that ran and did not hold."""


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: Callable[[argparse.Namespace], int | None],
    summary: str,
) -> argparse.ArgumentParser:
    """The parser of a command that calls `function`, whose result is the exit code; None: 0."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def add_parallel_sizes(parser: argparse.ArgumentParser) -> None:
    """The layout that a checkpoint is run in."""
    for dimension in ("tensor", "pipeline", "expert"):
        parser.add_argument(
            *both_spellings(f"{dimension}-model-parallel-size"),
            type=positive_int,
            metavar="N",
            help="instead of the checkpoint's",
        )


def add_chat(
    parser: argparse.ArgumentParser,
    help: str = "prompts are what the user of a conversation says, for a fine-tuned model",
) -> None:
    """How a model that was trained on conversations is asked."""
    parser.add_argument("--chat", action="store_true", help=help)
    parser.add_argument(
        *both_spellings("chat-template"),
        type=Path,
        metavar="FILE",
        help="the same with this template, instead of the one that belongs to the tokenizer (implies --chat)",
    )


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Where the tokenizer is that the model was trained with."""
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the model's, where it is not where training found it"
    )


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive whole number")
    return int(text)


def both_spellings(option: str) -> tuple[str, str]:
    """ "--an-option" and "--an_option", as the configuration's keys are spelled."""
    return f"--{option}", f"--{option.replace('-', '_')}"


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: use 0 to 1")
    return value
