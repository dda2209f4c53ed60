"""`mm1 generate`, `mm1 score` and `mm1 caption`; outside their room, which imports torch."""

import argparse
from pathlib import Path

from megatron_mm1.arguments import (
    add_chat,
    add_command,
    add_parallel_sizes,
    add_tokenizer,
    both_spellings,
    positive_int,
)


def add_inference_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _add_generate(commands)
    _add_score(commands)
    _add_caption(commands)


def generate(args: argparse.Namespace) -> int:
    from megatron_mm1.inference.ask import generate_main

    return generate_main(args)


def score(args: argparse.Namespace) -> int:
    from megatron_mm1.inference.ask import score_main

    return score_main(args)


def caption(args: argparse.Namespace) -> None:
    from megatron_mm1.inference.caption import caption_main

    caption_main(args)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "generate", generate, "continue prompts of text and images")
    _add_checkpoint(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help='"<image>" stands for an image; without it they come first')
    what.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help='JSON lines {"prompt": .., "images": [FILE, ..]}, each with any of the options below; - is standard input',
    )
    parser.add_argument(
        "--image", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="of --prompt, in its order"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines; otherwise printed")
    parser.add_argument(
        *both_spellings("max-new-tokens"), type=positive_int, default=128, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before the first of these"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument(*both_spellings("top-k"), type=int, metavar="N", help="of the N likeliest tokens only")
    parser.add_argument(
        *both_spellings("top-p"),
        type=float,
        default=1.0,
        metavar="X",
        help="of the likeliest that have this probability",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first line; each line has the next (%(default)s)"
    )
    _add_common(parser)


def _add_score(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "score", score, "log-likelihoods of texts behind prompts")
    _add_checkpoint(parser)
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="FILE",
        help='JSON lines {"prompt": .., "images": [FILE, ..], "continuation": ..}; with "with_end": false the end of '
        "the text is not counted; - is standard input",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines; otherwise printed")
    _add_common(parser)


def _add_caption(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "caption", caption, "describe images")
    _add_checkpoint(parser)
    parser.add_argument("--image", required=True, type=Path, nargs="+", action="extend", metavar="FILE")
    parser.add_argument(
        *both_spellings("max-new-tokens"), type=positive_int, default=32, metavar="N", help="(%(default)s)"
    )
    add_chat(parser)
    add_tokenizer(parser)
    add_parallel_sizes(parser)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *both_spellings("batch-size"), type=positive_int, default=64, metavar="N", help="at a time (%(default)s)"
    )
    add_chat(parser)
    add_tokenizer(parser)
    add_parallel_sizes(parser)
