"""Evaluates a checkpoint."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import xxhash

from megatron_mm1.checkpoint.format import digest_of, find_checkpoint, read_metadata
from megatron_mm1.data.chat import Chat, ChatTemplate
from megatron_mm1.data.tiling import Kind
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.answers import Responder
from megatron_mm1.evaluation.asking import ONE_COPY, Copies, ask
from megatron_mm1.evaluation.fewshot import FewShot
from megatron_mm1.evaluation.journal import Journal
from megatron_mm1.evaluation.plan import ZERO_SHOT_SERIES, Condition, Series, plan
from megatron_mm1.evaluation.report import write_report
from megatron_mm1.evaluation.results import Result, measure
from megatron_mm1.evaluation.tables import console, figures_table, refusals, samples, verdicts
from megatron_mm1.evaluation.task import build_task
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.loading import AS_TRAINED, ParallelSizes, open_engine

_JOURNAL = "finished"
IMAGES_TOGETHER = 8
"""Encoded at a time, always: resumed or not, and however many copies there are, an image becomes the same."""
_SHOWN_REFUSALS = 5


def evaluate_main(args: Namespace) -> None:
    """`mm1 eval`: `args` has checkpoint, task (names), data (TASK=DIR), output, limit, shots, control, image_tiling,
    max_image_tiles, chat, chat_template, tokenizer and the fields of `FewShot` and `ParallelSizes`.
    """
    settings = FewShot(
        seed=args.seed,
        high_resolution=args.high_resolution,
        high_resolution_shots=args.high_resolution_shots,
        chain_of_thought=args.chain_of_thought,
    )
    results = evaluate(
        args.checkpoint,
        args.task,
        args.output,
        series=Series(shots=tuple(args.shots), with_control=args.control, settings=settings),
        folders=_folders(args.data, args.task),
        limit=args.limit,
        sizes=ParallelSizes.of(args),
        image_tiling=args.image_tiling,
        max_image_tiles=args.max_image_tiles,
        chat=Chat.of(args),
        tokenizer=args.tokenizer,
    )
    if results is not None:
        print(samples(results))
        print(console(figures_table(results)))
        for line in verdicts(results):
            print(line)
        lines = refusals(results)
        for line in lines[:_SHOWN_REFUSALS]:
            print(f"not answered: {line}")
        if len(lines) > _SHOWN_REFUSALS:
            print(f"not answered: {len(lines) - _SHOWN_REFUSALS} more, see the report")
        files = sorted(path.name for path in args.output.iterdir() if path.is_file())
        print(f"written to {args.output}: {', '.join(files)}")


def _folders(given: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    """Folders by task out of "TASK=DIR" options.

    Raises:
        UserError: an option has another form, or names a task that is not evaluated.
    """
    folders = {}
    for option in given:
        name, equals, folder = option.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--data {option!r} is not of the form TASK=DIR")
        if name not in tasks:
            raise UserError(f"--data {option!r}: {name!r} is not evaluated; add --task {name}, or leave it out")
        folders[name] = Path(folder)
    return folders


def evaluate(
    checkpoint: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    series: Series = ZERO_SHOT_SERIES,
    folders: Mapping[str, Path] = MappingProxyType({}),
    limit: int | None = None,
    sizes: ParallelSizes = AS_TRAINED,
    image_tiling: Kind | None = None,
    max_image_tiles: int | None = None,
    chat: Chat | None = None,
    tokenizer: Path | None = None,
) -> list[Result] | None:
    """Run tasks on a checkpoint; every process of the job calls this. An evaluation that was interrupted goes on.

    Args:
        checkpoint: a checkpoint, or a folder of them (the newest is taken).
        tasks: built-in names or import paths.
        output: folder to write to, see `report.write_report`.
        series: how items are presented.
        folders: of the tasks' data, by task; not of those that know their own.
        limit: items per task at most.
        image_tiling, max_image_tiles, chat, tokenizer: see `open_engine`.

    Returns:
        The results on rank 0, None on the others.

    Raises:
        UserError: a task, its data or the checkpoint cannot be used.
    """
    built = {name: build_task(name, folders.get(name)) for name in dict.fromkeys(tasks)}
    conditions = plan(built, series, limit=limit)
    checkpoint = find_checkpoint(checkpoint)
    identity = _identity(checkpoint)
    _check_resolution(series.settings, image_tiling or read_metadata(checkpoint).mm1_config().data.image_tiling)
    with open_engine(
        checkpoint,
        sizes=sizes,
        images_together=IMAGES_TOGETHER,
        image_tiling=image_tiling,
        max_image_tiles=max_image_tiles,
        chat=chat,
        tokenizer=tokenizer,
    ) as engine:
        parallel = asdict(engine.config.parallel)
        digest = _digest(
            identity, parallel, chat=engine.chat, image_tiling=image_tiling, max_image_tiles=max_image_tiles
        )
        journal = Journal(output / _JOURNAL, model=digest)
        results = run(engine, conditions, copies=copies_of(engine), journal=journal)
        sees_images, is_writer = not engine.config.data.text_only, torch.distributed.get_rank() == 0
    if not is_writer:
        return None
    asked = {
        "chat": None if engine.chat is None else engine.chat.origin,
        "image_tiling": image_tiling,
        "max_image_tiles": max_image_tiles,
    }
    few_shot = _described(series) | {name: value for name, value in asked.items() if value is not None}
    description = {"checkpoint": identity, "parallel": parallel, "few_shot": few_shot, "limit": limit}
    write_report(output, description, results, name=identity["name"], with_images=sees_images)
    return results


def run(
    responder: Responder,
    conditions: Sequence[Condition],
    *,
    copies: Copies = ONE_COPY,
    journal: Journal | None = None,
    on_chunk: Callable[[], None] | None = None,
) -> list[Result]:
    """The result of each condition, on every rank.

    Args:
        copies, journal, on_chunk: see `ask`.

    Raises:
        UserError: not one item of a condition was answered.
    """
    outcomes = ask(responder, conditions, copies=copies, journal=journal, on_chunk=on_chunk)
    return [measure(condition, of_it) for condition, of_it in zip(conditions, outcomes, strict=True)]


def _check_resolution(settings: FewShot, tiling: Kind) -> None:
    """Raises UserError where some demonstrations are to be in high resolution and there is none."""
    if settings.high_resolution_shots is not None and settings.high_resolution is None and tiling == "none":
        raise UserError(
            f"only {settings.high_resolution_shots} demonstrations in high resolution, but no high resolution: this "
            "evaluation cuts no images into tiles, so say how many px it is, or leave this out"
        )


def copies_of(engine: Engine) -> Copies:
    replica = engine.replica
    return Copies(count=replica.count, index=replica.index, speaks=replica.is_leader)


def _described(series: Series) -> dict[str, Any]:
    fields = asdict(series.settings)
    del fields["permute_images"]
    return {**fields, "shots": sorted(set(series.shots)), "control": series.with_control}


def _digest(
    identity: Mapping[str, Any],
    parallel: Mapping[str, Any],
    *,
    chat: ChatTemplate | None = None,
    image_tiling: Kind | None = None,
    max_image_tiles: int | None = None,
) -> str:
    """Names weights, code, layout, chat template and tiling: what answers depend on, to the last digit."""
    known: tuple[Any, ...] = identity["digest"], identity["tokenizer"], identity["code_version"]
    others = (None if chat is None else chat.source, image_tiling, max_image_tiles)
    known += (sorted(parallel.items()), *(one for one in others if one is not None))
    return xxhash.xxh3_64_hexdigest(repr(known).encode())


def _identity(checkpoint: Path) -> dict[str, Any]:
    """Which weights were evaluated: the digest covers the checksums of the checkpoint's files."""
    metadata = read_metadata(checkpoint)
    return {
        "path": str(checkpoint),
        "name": metadata.config["name"],
        "iteration": metadata.iteration,
        "consumed_sequences": metadata.consumed_sequences,
        "tokenizer": metadata.tokenizer_fingerprint,
        "digest": digest_of(checkpoint),
        "code_version": metadata.code_version,
    }
