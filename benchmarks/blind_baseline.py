"""Does a model look at its images? Compares it with one trained the same way without them.

    python benchmarks/blind_baseline.py --sighted runs/quickstart --blind runs/blind

The blind model has the same size, steps and seed, and sees the same examples in the same order, with `data.text_only`
set: images and their positions are left out. It is trained first, unless it is there already. Both are then
evaluated on the held-out part of the demo corpus, the blind one without the images. Goals: 95 % bootstrap intervals
that do not overlap.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from goals import Goal, report

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict, to_yaml
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.results import ALL, Figures, read_figures

CAPTIONS, QUESTIONS = "demo_captions", "demo_questions"
RESULTS = "blind_baseline.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a model with one trained without images.")
    parser.add_argument("--sighted", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--blind", type=Path, default=Path("runs/blind"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="to train and evaluate on (%(default)s)")
    args = parser.parse_args(argv)
    try:
        config = finished_config(args.sighted)
        train_blind(blind_config(config, args.blind), processes=args.processes)
        sighted, blind = (evaluate(run, processes=args.processes) for run in (args.sighted, args.blind))
    except UserError as error:
        print(f"blind_baseline: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    for name, figures in (("sighted", sighted), ("blind", blind)):
        print_figures(name, figures)
    goals = compare(sighted, blind)
    (args.blind / RESULTS).write_text(json.dumps([asdict(goal) | {"holds": goal.holds} for goal in goals], indent=1))
    settings = {
        "model": config.name,
        "steps": config.training.train_iters,
        "sequences per step": config.training.global_batch_size,
        "positions per sequence": config.data.seq_length,
        "seeds": f"weights {config.training.seed}, data {config.data.seed}",
        "intervals": "95 % percentile bootstrap, 10,000 resamples of images (questions) or concepts (captions)",
    }
    return report(settings, goals)


def finished_config(run: Path) -> MM1Config:
    """The configuration of a run that has taken all its steps.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    metadata = read_metadata(find_checkpoint(run))
    config = metadata.mm1_config()
    if metadata.iteration < config.training.train_iters:
        raise UserError(f"{run} has taken {metadata.iteration} of {config.training.train_iters} steps: finish it first")
    return config


def blind_config(config: MM1Config, run: Path) -> MM1Config:
    """The same training without images."""
    return replace(config, data=replace(config.data, text_only=True), run_dir=str(run))


def train_blind(config: MM1Config, *, processes: int) -> None:
    """Train, go on from where an interrupted training stopped, or keep what is finished.

    Raises:
        UserError: the run's folder holds another training.
    """
    run = Path(config.run_dir)
    if (run / "checkpoints" / "latest").is_file():
        metadata = read_metadata(find_checkpoint(run))
        if metadata.config != to_dict(config):
            raise UserError(f"{run} holds a training with other settings: remove it, or name another --blind")
        if metadata.iteration >= config.training.train_iters:
            print(f"keeping {run}: {metadata.iteration} steps taken")
            return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "blind.yaml"
        file.write_text(to_yaml(config))
        launch(["train", "--config", str(file)], processes=processes)


def evaluate(run: Path, *, processes: int) -> dict[str, Figures]:
    """Figures of the run's newest checkpoint, each process with a copy of the model."""
    output = run / "blind_baseline"
    tasks = ["--task", CAPTIONS, "--task", QUESTIONS]
    whole = ["--tensor-model-parallel-size", "1"]
    launch(["eval", "--checkpoint", str(run), *tasks, "--output", str(output), *whole], processes=processes)
    return read_figures(output)


def launch(arguments: Sequence[str], *, processes: int) -> None:
    """Run `mm1` on this machine under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([*torchrun, "-m", "megatron_mm1", *arguments], check=True, env=environment)


def compare(sighted: Mapping[str, Figures], blind: Mapping[str, Figures]) -> list[Goal]:
    """Of each pair of intervals the two ends that face each other."""
    captions, blind_captions = sighted[CAPTIONS][ALL], blind[CAPTIONS][ALL]
    loss = captions["loss_true_image"].high
    goals = [
        Goal("caption_loss_upper_vs_other_image", loss, "nats/token", "<", captions["loss_other_image"].low),
        Goal("caption_loss_upper_vs_blind", loss, "nats/token", "<", blind_captions["loss_true_image"].low),
    ]
    ours, theirs = (figures[QUESTIONS]["shape or colour"]["accuracy"] for figures in (sighted, blind))
    goals.append(Goal("shape_or_colour_accuracy_lower_vs_blind", ours.low, "share", ">", theirs.high))
    return goals


def print_figures(name: str, figures: Mapping[str, Figures]) -> None:
    for task, by_group in figures.items():
        for group, named in by_group.items():
            for measure, interval in named.items():
                print(f"{name:<8} {task:<15} {group:<16} {measure:<17} {interval} of {interval.count}")


if __name__ == "__main__":
    sys.exit(main())
