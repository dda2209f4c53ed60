"""Runs tasks on a checkpoint."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm

from megatron_mm1.checkpoint.format import digest_of, find_checkpoint, read_metadata
from megatron_mm1.data.records import Image, Text
from megatron_mm1.evaluation.contact_sheet import Panel, write_contact_sheet
from megatron_mm1.evaluation.fewshot import ZERO_SHOT, FewShot, Request, demonstration_pool, request
from megatron_mm1.evaluation.items import ImageFile, Item, Prompt
from megatron_mm1.evaluation.report import Figures, MeasuredItem, samples, table, write_results
from megatron_mm1.evaluation.task import Outcome, Task, build_task
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.engine import Prompt as LoadedPrompt
from megatron_mm1.inference.loading import AS_TRAINED, ParallelSizes, open_engine

CONTACT_SHEET = "contact_sheet.png"
_ITEMS_AT_A_TIME = 64
_PANELS_PER_TASK = 12


def evaluate_main(args: Namespace) -> None:
    """`mm1 eval`: `args` has checkpoint, task (names), output, limit and the fields of `ParallelSizes`."""
    results = evaluate(
        args.checkpoint,
        args.task,
        args.output,
        limit=args.limit,
        sizes=ParallelSizes.of(args),
    )
    if results is not None:
        print(samples(args.output))
        print(table(results))
        print(f"written to {args.output}")


def evaluate(
    checkpoint: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    settings: FewShot = ZERO_SHOT,
    folders: Mapping[str, Path] = MappingProxyType({}),
    limit: int | None = None,
    sizes: ParallelSizes = AS_TRAINED,
) -> dict[str, Figures] | None:
    """Run tasks on a checkpoint; every process of the job calls this.

    Writes results.json, items.jsonl and, where a model that sees images generates text about them, contact_sheet.png.

    Args:
        checkpoint: a checkpoint, or a folder of them (the newest is taken).
        tasks: built-in names or import paths.
        output: folder to write to.
        settings: how items are presented.
        folders: of the tasks' data, by task; not of those that know their own.
        limit: items per task at most.

    Returns:
        Figures by task on rank 0, None on the others.

    Raises:
        UserError: a task, its data or the checkpoint cannot be used; nothing has been written.
    """
    built = {name: build_task(name, folders.get(name)) for name in dict.fromkeys(tasks)}
    splits = {name: task.items() for name, task in built.items()}
    asked = {name: _ask(task, splits[name].items[:limit], settings) for name, task in built.items()}
    checkpoint = find_checkpoint(checkpoint)
    with open_engine(checkpoint, sizes=sizes) as engine:
        outcomes = {
            name: run_requests(engine, [one for _, one in asked[name]], task, settings, label=name)
            for name, task in built.items()
        }
        config, is_writer = engine.config, torch.distributed.get_rank() == 0
    if not is_writer:
        return None
    measured = {name: _measure(task, asked[name], outcomes[name]) for name, task in built.items()}
    sections = [] if config.data.text_only else _sections(measured)
    if sections:
        write_contact_sheet(output / CONTACT_SHEET, sections)
    description = {
        "checkpoint": _identity(checkpoint),
        "parallel": asdict(config.parallel),
        "few_shot": asdict(settings),
        "limit": limit,
        "left_out": {name: split.counts() for name, split in splits.items()},
    }
    return write_results(output, description, measured)


def _ask(task: Task, items: Sequence[Item], settings: FewShot) -> list[tuple[Item, Request]]:
    """Items, each behind its demonstrations."""
    pool = demonstration_pool(task, settings)
    return [(item, request(item, task, settings, pool=pool)) for item in items]


def _measure(task: Task, asked: Sequence[tuple[Item, Request]], outcomes: Sequence[Outcome]) -> list[MeasuredItem]:
    measures = task.measure([item for item, _ in asked], outcomes)
    return [
        MeasuredItem(item, one.prompt, outcome, of_item)
        for (item, one), outcome, of_item in zip(asked, outcomes, measures, strict=True)
    ]


def run_requests(
    engine: Engine, requests: Sequence[Request], task: Task, settings: FewShot, *, label: str
) -> list[Outcome]:
    """The outcome of each request, on every rank; each copy of the model does its share of them."""
    share = range(engine.replica, len(requests), engine.num_replicas)
    done: dict[int, Outcome] = {}
    # None: shown on a terminal only.
    is_silent = None if torch.distributed.get_rank() == 0 else True
    with tqdm(total=len(share), desc=label, unit="item", disable=is_silent) as progress:
        for start in range(0, len(share), _ITEMS_AT_A_TIME):
            indices = share[start : start + _ITEMS_AT_A_TIME]
            outcomes = _run_together(engine, [requests[i] for i in indices], task, settings)
            done.update(zip(indices, outcomes, strict=True))
            progress.update(len(indices))
    gathered: list[dict[int, Outcome]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, done if engine.is_replica_leader else {})
    everything = {index: outcome for part in gathered for index, outcome in part.items()}
    return [everything[index] for index in range(len(requests))]


def _run_together(engine: Engine, requests: Sequence[Request], task: Task, settings: FewShot) -> list[Outcome]:
    load = partial(_loaded, read=cache(ImageFile.read))  # each image once: an item's candidates show the same ones
    max_new_tokens = settings.stopping(task).max_new_tokens
    texts = [""] * len(requests)
    if max_new_tokens:
        texts = engine.generate([load(one.prompt) for one in requests], max_new_tokens=max_new_tokens)
    pairs = [pair for one in requests for pair in one.scored]
    scores = iter(engine.score([load(prompt) for prompt, _ in pairs], [text for _, text in pairs]))
    return [
        Outcome(text=settings.answer(task, text), scores=tuple(next(scores) for _ in one.scored), raw=text)
        for one, text in zip(requests, texts, strict=True)
    ]


def _loaded(prompt: Prompt, *, read: Callable[[ImageFile], Image]) -> LoadedPrompt:
    return [read(part) if isinstance(part, ImageFile) else part for part in prompt]


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


def _sections(measured: Mapping[str, Sequence[MeasuredItem]]) -> list[tuple[str, list[Panel]]]:
    """The first items of each task that show an image and got an answer: their order is a fair sample."""
    sections = []
    for name, of_task in measured.items():
        panels = [_panel(one) for one in of_task if one.outcome.text and one.item.images][:_PANELS_PER_TASK]
        if panels:
            sections.append((f"{name} (green: as the truth has it)", panels))
    return sections


def _panel(one: MeasuredItem) -> Panel:
    question = "".join(part.text for part in one.prompt if isinstance(part, Text))
    image = one.item.images[0].read().data
    return Panel(image=image, question=question, output=one.outcome.text, reference=one.item.answer)
