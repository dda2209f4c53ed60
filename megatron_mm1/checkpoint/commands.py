"""`mm1 convert ..`; what a conversion needs is imported when it runs."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_mm1.arguments import FAILED, add_chat, positive_int
from megatron_mm1.config.derived import COMPONENTS


def convert(argv: Sequence[str]) -> int:
    parser = build_convert_parser()
    args, config_arguments = parser.parse_known_args(argv)
    if config_arguments and not args.takes_config:
        parser.error(f"unrecognized arguments: {' '.join(config_arguments)}")
    if args.takes_output and args.output is None and not args.dry_run:
        parser.error(f"{args.conversion} needs --output DIR, or --dry-run")
    # Large tensors come and go; huge pages make getting memory for them three times as fast (read by torch).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_mm1.checkpoint import compare, convert, summary

    match args.conversion:
        case "verify":
            return 0 if compare.verify_main(args) else FAILED
        case "inspect":
            print(summary.inspect(args.folder))
        case name if args.takes_config:
            getattr(convert, f"{name}_main")(args, config_arguments)
        case name:
            getattr(convert, f"{name}_main")(args)
    return 0


def build_convert_parser() -> argparse.ArgumentParser:
    """The options of `convert`; those of the configuration, which some conversions take, are left over."""
    parser = argparse.ArgumentParser(
        prog="mm1 convert",
        description="Import, export and change checkpoints, a tensor at a time, on one CPU process.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="conversion")
    source = _add_conversion(
        commands,
        "import",
        "make a checkpoint to start from out of a decoder, a tower or a whole model of transformers, open_clip or "
        "megatron-core",
        config="the rest of the model and of the run, as for mm1 train (--preset, --model.vision.num_layers, ..)",
    )
    source.add_argument(
        "--source", required=True, action="append", type=Path, metavar="FOLDER", help="repeatable: parts are combined"
    )
    source.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer the decoder was trained with")

    export = _add_conversion(commands, "export", "write weights as another library's folder", checkpoint=True)
    export.add_argument(
        "--family", required=True, metavar="NAME", help="transformers: the whole model; or llama, clip, llava, .."
    )
    export.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="X", help="of weights in a file (%(default)s)"
    )
    export.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the model's, where it is not where training found it"
    )
    export.add_argument(
        "--image-token-id", type=int, metavar="N", help="for llava (the tokenizer's, where that is at hand)"
    )
    add_chat(export, "for transformers: the folder has the chat template of a fine-tuned model")

    reshard = _add_conversion(
        commands,
        "reshard",
        "write a checkpoint, training state included, for another layout",
        checkpoint=True,
        config="the layout's (--tensor-model-parallel-size, ..)",
    )
    reshard.add_argument("--pieces", type=positive_int, default=1, metavar="N", help="chunks of a tensor (%(default)s)")

    upcycle = _add_conversion(
        commands,
        "upcycle",
        "put experts in place of a dense model's feed-forward layers",
        checkpoint=True,
        config="the experts' (--num-moe-experts, --moe-layer-freq, --moe-router-topk, ..)",
    )
    upcycle.add_argument("--router-seed", type=int, default=1234, metavar="N", help="(%(default)s)")

    resize = _add_conversion(
        commands, "resize", "resample position embeddings for images of another size", checkpoint=True
    )
    resize.add_argument("--image-size", required=True, type=positive_int, metavar="PX", help="side of the new images")

    _add_conversion(commands, "merge", "merge LoRA's adapters into the weights", checkpoint=True)
    take = _add_conversion(commands, "take", "make a checkpoint of one part of a model", checkpoint=True)
    exchange = _add_conversion(commands, "replace", "exchange one part of a model", checkpoint=True)
    exchange.add_argument(
        "--from", required=True, type=Path, dest="source", metavar="DIR", help="a checkpoint, or a folder as for import"
    )
    for command in (take, exchange):
        command.add_argument("--component", required=True, choices=list(COMPONENTS))
    _add_verify(commands)
    look = commands.add_parser("inspect", help="show what a checkpoint or a folder of weights holds")
    look.add_argument("folder", type=Path, metavar="DIR")
    look.set_defaults(takes_config=False, takes_output=False)
    return parser


def _add_conversion(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    *,
    checkpoint: bool = False,
    config: str | None = None,
) -> argparse.ArgumentParser:
    """A conversion that writes; `config` says which of the configuration's keys are options too."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=config and f"Further options are the configuration's: {config}.",
        allow_abbrev=False,
    )
    parser.set_defaults(takes_config=config is not None, takes_output=True)
    if checkpoint:
        parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the tensors, write nothing")
    return parser


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verify = commands.add_parser(
        "verify",
        help="compare two checkpoints or folders of weights, of any formats; exit code 1 if they differ",
        allow_abbrev=False,
    )
    verify.add_argument("a", type=Path, metavar="A")
    verify.add_argument("b", type=Path, metavar="B")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="absolute difference that passes; above 0, types may differ (%(default)s)",
    )
    verify.add_argument(
        "--component",
        action="append",
        choices=[*COMPONENTS, "optimizer"],
        help="compare this alone; repeatable (all, and the optimizer's state where both have it)",
    )
    verify.set_defaults(takes_config=False, takes_output=False)
