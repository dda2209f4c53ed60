"""`mm1 data overlap`: the search from the command line, and what it found as text and JSON."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mm1.data.files import replace_file
from megatron_mm1.data.overlap.data_sets import open_data_set
from megatron_mm1.data.overlap.search import LISTED, Kind, Overlap, Settings, find_overlap
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError


def overlap_main(args: Namespace) -> bool:
    """Search, print, write the report; whether anything overlaps.

    Args:
        args: a, b (prepared folder or READER:PATH), tokenizer and output (paths or None), hamming, text_words, and
            num_workers (None: one for each core).

    Raises:
        UserError: a data set or the tokenizer cannot be used, or an evaluation set without a document.
    """
    if args.text_words < 0:
        raise UserError(f"--text-words {args.text_words}: must be at least 0")
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    a, b = (open_data_set(name, tokenizer=tokenizer) for name in (args.a, args.b))
    settings = Settings(hamming=args.hamming, text_words=args.text_words)
    num_workers = args.num_workers or len(os.sched_getaffinity(0))
    found = find_overlap(a, b, settings=settings, num_workers=num_workers)
    if not found.a.documents or not found.b.documents:
        raise UserError(f"nothing to compare: {args.a} has {found.a.documents} documents, {args.b} {found.b.documents}")
    report = report_of(found, a=args.a, b=args.b, settings=settings)
    print(summary(report))
    if args.output is not None:
        replace_file(args.output, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    return bool(report["hits"])


def report_of(found: Overlap, *, a: str, b: str, settings: Settings) -> dict[str, Any]:
    """What `--output` writes: settings, what was read, counts by kind, and hits in the order of the evaluation set."""
    hits = sorted(found.hits, key=lambda numbered: numbered[0])  # stable: the training data's order within
    return {
        "a": {"data": a, **vars(found.a)},
        "b": {"data": b, **vars(found.b), "overlapping": _any(list(found.matches.values()))},
        "settings": vars(settings),
        "kinds": {
            kind: {
                "a_documents": found.a_documents[kind],
                "b_documents": _any([found.matches[kind]]),
                "pairs": int(found.matches[kind].sum()),
            }
            for kind in Kind
        },
        "listed_per_document": LISTED,
        "hits": [vars(hit) for _, hit in hits],
    }


def summary(report: dict[str, Any]) -> str:
    """The counts of a report, for people."""
    lines = [
        f"{name.upper()}: {side['documents']:,} documents with {side['images']:,} images in {side['data']} "
        f"({side['rejected']:,} records cannot be used, {side['unhashed']:,} images compared by their bytes alone)"
        for name in ("a", "b")
        for side in [report[name]]
    ]
    lines.append(f"{'':<16}{'documents of A':>16}{'documents of B':>16}{'pairs':>12}")
    for kind, counts in report["kinds"].items():
        lines.append(f"{kind:<16}{counts['a_documents']:>16,}{counts['b_documents']:>16,}{counts['pairs']:>12,}")
    share = report["b"]["overlapping"] / report["b"]["documents"]
    lines.append(f"{report['b']['overlapping']:,} documents of B ({share:.1%}) overlap with A")
    return "\n".join(lines)


def _any(matches: Sequence[np.ndarray]) -> int:
    """How many evaluation documents match in any of these ways."""
    return int(np.logical_or.reduce(matches).sum())
