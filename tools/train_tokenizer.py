#!/usr/bin/env python3
"""Train a SentencePiece tokenizer on the text of data sets, or add the symbols for images and conversations to one."""

import argparse
import sys
from pathlib import Path

from megatron_mm1.data.readers import READERS, Reader, open_reader
from megatron_mm1.data.sampling import sample_texts
from megatron_mm1.data.tokenizer import extend_tokenizer, train_tokenizer
from megatron_mm1.errors import UserError

GIGABYTE = 10**9


def open_data_set(words: list[str]) -> Reader:
    """The reader of one `--data`."""
    options = [word.partition("=") for word in words[2:]]
    if len(words) < 2 or not all(name and equals for name, equals, _ in options):
        raise UserError(f"--data {' '.join(words)}: write READER PATH, and the reader's options as NAME=VALUE")
    name, path = words[:2]
    return open_reader(name, Path(path), {option: value for option, _, value in options})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        nargs="+",
        metavar=("READER PATH", "NAME=VALUE"),
        action="append",
        help="a data set: its reader "
        f"({', '.join(READERS)} or package.module.Class), where it is, and the reader's options; repeatable",
    )
    source.add_argument(
        "--extend", type=Path, metavar="FILE", help="SentencePiece model or tokenizer.json to add symbols to"
    )
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=GIGABYTE,
        metavar="N",
        help="text to train on at most, taken evenly over the shards; memory is about ten times it (%(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    try:
        if args.extend is not None:
            added = extend_tokenizer(args.extend, args.output)
            print(f"added {', '.join(added) if added else 'nothing'}: {args.output}")
        else:
            texts = sample_texts([open_data_set(words) for words in args.data], max_bytes=args.max_bytes)
            train_tokenizer(texts, args.output, vocab_size=args.vocab_size)
    except UserError as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
