"""What fine-tuning was worth: held-out questions before and after, and after it also about other images.

    python benchmarks/finetuning_gain.py runs/finetune/none runs/finetune/overview_and_crops

Each folder is one that examples/finetune_quickstart.sh left, with the evaluations `before` and `after`. Goals: of all
questions, and of the open ones (for a shape or a colour), 95 % bootstrap intervals that do not overlap.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from goals import Goal, report

from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.results import ALL, Figures, read_figures

OWN, EXCHANGED = "demo_questions", "demo_questions_exchanged"
OPEN = "shape or colour"
GROUPS = (ALL, "yes-no", OPEN, "shape", "colour")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare answers before and after fine-tuning.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR")
    args = parser.parse_args(argv)
    try:
        names = distinct_names(args.runs)
        evaluated = {
            name: (read_figures(run / "before"), read_figures(run / "after"))
            for name, run in zip(names, args.runs, strict=True)
        }
    except UserError as error:
        print(f"finetuning_gain: error: {error}", file=sys.stderr)
        return 2
    for name, (before, after) in evaluated.items():
        print("\n".join(table(name, before, after)))
    return report({}, [goal for name, figures in evaluated.items() for goal in goals(name, *figures)])


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, which goals are told apart by.

    Raises:
        UserError: two of them are the same.
    """
    names = [run.resolve().name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several runs are called {', '.join(twice)}: rename their folders, or compare one at a time")
    return names


def table(name: str, before: Mapping[str, Figures], after: Mapping[str, Figures]) -> list[str]:
    """Markdown: the share of right answers by kind of question."""
    lines = [f"| {name} | before | after | after, other images |", "| --- | --- | --- | --- |"]
    for group in GROUPS:
        columns = (before[OWN], after[OWN], after[EXCHANGED])
        cells = [str(figures[group]["accuracy"]) if group in figures else "" for figures in columns]
        count = f" ({after[OWN][group]['accuracy'].count})" if group in after[OWN] else ""
        lines.append(f"| {group}{count} | {' | '.join(cells)} |")
    return lines


def goals(name: str, before: Mapping[str, Figures], after: Mapping[str, Figures]) -> list[Goal]:
    """Of each pair of intervals the two ends that face each other."""
    others = {"before": before[OWN], "other_images": after[EXCHANGED]}
    return [
        Goal(
            f"{name}_{kind}_accuracy_after_lower_vs_{what}",
            after[OWN][group]["accuracy"].low,
            "share",
            ">",
            figures[group]["accuracy"].high,
        )
        for kind, group in {"all": ALL, "open": OPEN}.items()
        for what, figures in others.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
