"""A run as one HTML file."""

import argparse
from pathlib import Path

from megatron_mm1.config.loading import from_yaml
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.files import replace_file
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.pages.style import document
from megatron_mm1.report import sections
from megatron_mm1.report.log import RunLog, read_log
from megatron_mm1.report.samples import evaluation_folders, samples


def report_main(args: argparse.Namespace) -> None:
    """Raises `UserError` where there is no run, or no place to write to."""
    output = args.output or args.run / "report.html"
    content = run_page(args.run, output=output)
    try:
        replace_file(output, content.encode())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
    print(output)


def run_page(run: Path, *, output: Path) -> str:
    """HTML of a run's folder.

    Args:
        output: where it will be, for its links.

    Raises:
        UserError: the folder has no log, or a damaged evaluation.
    """
    log, config = read_log(run), _config(run)
    body = [
        sections.summary(log),
        "<h2>Training</h2>",
        sections.training(log),
        "<h2>Validation</h2>",
        sections.validation(log),
        sections.experts(log),
        sections.evaluations(log),
        sections.memory(log),
        *(samples(folder, page=output) for folder in evaluation_folders(run)),
    ]
    title = f"{config.name if config else run.name}: {run}"
    description = _description(log, config)
    return document("\n".join(part for part in body if part), title=title, description=description)


def _config(run: Path) -> MM1Config | None:
    """The run's configuration; None where it is not there or of another version."""
    try:
        return from_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ConfigError):
        return None


def _description(log: RunLog, config: MM1Config | None) -> str:
    step = max((step for records in log.records.values() for step in records), default=0)
    facts = [f"step {step:,}"]
    if config is None:
        facts.append("its config.yaml cannot be read")
    else:
        parallel = config.parallel
        facts[0] += f" of {config.training.train_iters:,}"
        facts += [
            f"{config.training.global_batch_size} sequences of {config.data.seq_length:,} positions a step",
            f"tensor {parallel.tensor_model_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}, "
            f"context {parallel.context_parallel_size}, expert {parallel.expert_model_parallel_size}",
            f"{config.optimizer.optimizer}, peak rate {config.optimizer.lr:g}",
            config.training.precision,
        ]
    if log.unreadable:
        facts.append(f"{log.unreadable} lines of the log could not be read")
    return "; ".join(facts)
