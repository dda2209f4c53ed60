#!/usr/bin/env python3
"""Train a SentencePiece tokenizer on the text of data sets."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_mm1.data.readers import READERS, open_reader
from megatron_mm1.data.records import Text
from megatron_mm1.data.tokenizer import train_tokenizer
from megatron_mm1.errors import UserError


def texts_of(data_sets: list[list[str]]) -> Iterator[str]:
    """Every text of (reader, path) pairs."""
    for reader, path in data_sets:
        for document in open_reader(reader, Path(path)):
            yield from (part.text for part in document.parts if isinstance(part, Text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        nargs=2,
        metavar=("READER", "PATH"),
        action="append",
        required=True,
        help=f"a data set and its reader ({', '.join(READERS)} or package.module.Class); repeatable",
    )
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="(%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model file to write")
    args = parser.parse_args()
    try:
        train_tokenizer(texts_of(args.data), args.output, vocab_size=args.vocab_size)
    except UserError as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
