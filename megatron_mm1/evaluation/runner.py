"""Runs tasks on a checkpoint."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_mm1.checkpoint.format import digest_of, find_checkpoint, read_metadata
from megatron_mm1.data.records import Image, Text
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.contact_sheet import Panel, write_contact_sheet
from megatron_mm1.evaluation.report import Figures, MeasuredItem, samples, table, write_results
from megatron_mm1.evaluation.task import Item, Outcome, Task, build_task
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.loading import AS_TRAINED, ParallelSizes, open_engine
from megatron_mm1.inference.requests import Failure, GenerationRequest, ScoringRequest

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
    limit: int | None = None,
    sizes: ParallelSizes = AS_TRAINED,
) -> dict[str, Figures] | None:
    """Run tasks on a checkpoint; every process of the job calls this.

    Writes results.json, items.jsonl and, where a model that sees images generates text about them, contact_sheet.png.

    Args:
        checkpoint: a checkpoint, or a folder of them (the newest is taken).
        tasks: built-in names or import paths.
        output: folder to write to.
        limit: items per task at most.

    Returns:
        Figures by task on rank 0, None on the others.

    Raises:
        UserError: a task, its data or the checkpoint cannot be used; nothing has been written.
    """
    built = {name: build_task(name) for name in dict.fromkeys(tasks)}
    items = {name: list(task.items())[:limit] for name, task in built.items()}
    for name, of_task in items.items():
        if not of_task:
            raise UserError(f"evaluation task {name!r} has no items")
    checkpoint = find_checkpoint(checkpoint)
    with open_engine(checkpoint, sizes=sizes) as engine:
        outcomes = {name: run_items(engine, task, items[name], label=name) for name, task in built.items()}
        config, is_writer = engine.config, torch.distributed.get_rank() == 0
    if not is_writer:
        return None
    measured = {
        name: [
            MeasuredItem(item, outcome, task.measure(item, outcome))
            for item, outcome in zip(items[name], outcomes[name], strict=True)
        ]
        for name, task in built.items()
    }
    sections = [] if config.data.text_only else _sections(measured)
    if sections:
        write_contact_sheet(output / CONTACT_SHEET, sections)
    description = {"checkpoint": _identity(checkpoint), "parallel": asdict(config.parallel), "limit": limit}
    return write_results(output, description, measured)


def run_items(engine: Engine, task: Task, items: Sequence[Item], *, label: str) -> list[Outcome]:
    """The outcome of each item, on every rank; each copy of the model does its share of the items."""
    share = range(engine.replica.index, len(items), engine.replica.count)
    done: dict[int, Outcome] = {}
    # None: shown on a terminal only.
    is_silent = None if torch.distributed.get_rank() == 0 else True
    with tqdm(total=len(share), desc=label, unit="item", disable=is_silent) as progress:
        for start in range(0, len(share), _ITEMS_AT_A_TIME):
            indices = share[start : start + _ITEMS_AT_A_TIME]
            done.update(zip(indices, _run_together(engine, task, [items[i] for i in indices]), strict=True))
            progress.update(len(indices))
    gathered: list[dict[int, Outcome]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, done if engine.replica.is_leader else {})
    everything = {index: outcome for part in gathered for index, outcome in part.items()}
    return [everything[index] for index in range(len(items))]


def _run_together(engine: Engine, task: Task, items: Sequence[Item]) -> list[Outcome]:
    texts = [""] * len(items)
    if task.max_new_tokens:
        requests = [GenerationRequest(prompt=item.prompt, max_new_tokens=task.max_new_tokens) for item in items]
        texts = [answered(answer).text for answer in engine.generate(requests)]
    pairs = [pair for item in items for pair in item.scored]
    answers = engine.score([ScoringRequest(prompt=prompt, continuation=text) for prompt, text in pairs])
    scores = iter([answered(answer) for answer in answers])
    return [
        Outcome(text=text.strip(), scores=tuple(next(scores) for _ in item.scored))
        for item, text in zip(items, texts, strict=True)
    ]


def answered[Answer](answer: Answer | Failure) -> Answer:
    """The answer to a request.

    Raises:
        UserError: it could not be answered.
    """
    if isinstance(answer, Failure):
        raise UserError(answer.message)
    return answer


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
        panels = [_panel(one) for one in of_task if one.outcome.text and _images(one.item)][:_PANELS_PER_TASK]
        if panels:
            sections.append((f"{name} (green: as the truth has it)", panels))
    return sections


def _panel(one: MeasuredItem) -> Panel:
    question = "".join(part.text for part in one.item.prompt if isinstance(part, Text))
    return Panel(image=_images(one.item)[0], question=question, output=one.outcome.text, reference=one.item.reference)


def _images(item: Item) -> list[bytes]:
    return [part.data for part in item.prompt if isinstance(part, Image)]
