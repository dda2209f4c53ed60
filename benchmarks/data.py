"""The data engine against its goals, part by part: `python benchmarks/data.py [images planning loading preparing]`.

`loading` and `preparing` read the demo corpus, which `make corpus` makes in .cache/demo-corpus.
"""

import argparse
import sys
from importlib import import_module
from typing import Any

from goals import Goal, report

PARTS = ("images", "planning", "loading", "preparing")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; the exit code: 0 only if every goal of each holds."""
    parsed = parse(arguments)
    settings: dict[str, Any] = {}
    goals: list[Goal] = []
    for part in parsed.parts:
        print(f"{part} ..", file=sys.stderr, flush=True)
        of_part, found = import_module(f"data_{part}").measure(parsed)
        settings |= {f"{part} {name}": value for name, value in of_part.items()}
        goals += found
    return report(settings, goals)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; none: all")
    parser.add_argument("--documents", type=int, default=300_000, help="of each source that is planned")
    parser.add_argument("--images", type=int, default=64, help="that are decoded at a time")
    parser.add_argument("--rounds", type=int, default=7, help="of decoding")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts")
    parsed = parser.parse_args(arguments)
    unknown = sorted({*parsed.parts} - {*PARTS})
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    parsed.parts = parsed.parts or list(PARTS)
    return parsed


if __name__ == "__main__":
    sys.exit(main())
