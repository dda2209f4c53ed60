"""What the workers of test_evaluation run: tasks on a model in one layout, alone and between training steps."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.chat import ChatTemplate
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.evaluation import asking
from megatron_mm1.evaluation.fewshot import ZERO_SHOT
from megatron_mm1.evaluation.in_training import TaskEvaluation
from megatron_mm1.evaluation.items import Candidate
from megatron_mm1.evaluation.journal import Journal
from megatron_mm1.evaluation.plan import Condition, Series, plan
from megatron_mm1.evaluation.results import overall, write_results
from megatron_mm1.evaluation.runner import IMAGES_TOGETHER, copies_of, run
from megatron_mm1.evaluation.task import Measure, Outcome, Refusal
from megatron_mm1.inference.engine import Engine
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training.build import build_module, named_parameters
from megatron_mm1.training.checkpointing import load_weights
from tests.new_words import NewWords
from tests.parallel.jobs import Run

SERIES = Series(shots=(0, 2), with_control=True, settings=replace(ZERO_SHOT, seed=3))


def conditions(folder: Path, *, num_items: int = 11, series: Series = SERIES) -> tuple[Condition, ...]:
    """Generation and scores, a last item that does not fit, and chunks of a few items."""
    asking._CHUNK = 4
    task = NewWords(folder, num_items=num_items)
    *others, last = (replace(one, candidates=(Candidate("dax"), Candidate("a wug"))) for one in task._items)
    task._items = (*others, replace(last, question="why? " * 200))
    return plan({"words": task}, series)


def _model(config: MM1Config, checkpoint: Path, groups: Any) -> Any:
    model = build_module(config, backend="local", pg_collection=groups)
    load_weights(checkpoint, [model], pg_collection=groups)
    return model


def _engine(config: MM1Config, checkpoint: Path, groups: Any) -> Engine:
    return Engine(
        config,
        _model(config, checkpoint, groups),
        open_tokenizer(config.data.tokenizer),
        pg_collection=groups,
        images_together=IMAGES_TOGETHER,
    )


def answer(config: MM1Config, checkpoint: Path, folder: Path) -> list[tuple[Outcome | Refusal, ...]]:
    """Outcomes by condition."""
    groups = build_process_groups(config.parallel, seed=1)
    try:
        engine = _engine(config, checkpoint, groups)
        return asking.ask(engine, conditions(folder), copies=copies_of(engine))
    finally:
        destroy_process_groups()


def count_encoded(config: MM1Config, checkpoint: Path, folder: Path, *, shots: int) -> tuple[int, int]:
    """(images encoded, images there are) in an evaluation."""
    groups = build_process_groups(config.parallel, seed=1)
    try:
        engine = _engine(config, checkpoint, groups)
        asked = conditions(folder, series=Series(shots=(0, shots), with_control=True))
        run(engine, asked, copies=copies_of(engine))
        answered = [request for one in asked for item, request in one.asked if "why? why?" not in item.question]
        images = {part for request in answered for part in request.prompt if not hasattr(part, "text")}
        return engine.features.num_encoded, len(images)
    finally:
        destroy_process_groups()


def interrupt_and_go_on(config: MM1Config, checkpoint: Path, folder: Path, output: Path, *, kept: int) -> None:
    """Evaluate into output/whole; then from the first `kept` lines of each journal of that, and half a line, into
    output/resumed.
    """
    groups = build_process_groups(config.parallel, seed=1)
    is_writer = torch.distributed.get_rank() == 0
    try:
        for name in ("whole", "resumed"):
            finished = output / name / "finished"
            if name == "resumed" and is_writer:
                shutil.copytree(output / "whole" / "finished", finished)
                for file in finished.iterdir():
                    lines = file.read_bytes().splitlines(keepends=True)
                    file.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept:])[:20])
            torch.distributed.barrier()
            engine = _engine(config, checkpoint, groups)
            journal = Journal(finished, model="m")
            results = run(engine, conditions(folder), copies=copies_of(engine), journal=journal)
            if is_writer:
                write_results(output / name, {}, results)
            torch.distributed.barrier()
    finally:
        destroy_process_groups()


def train_with_and_without(config: MM1Config, folder: Path) -> tuple[list[Any], list[Any], list[dict[str, float]]]:
    """What three steps come to without and with an evaluation after each: losses, modes, weights, optimizer and random
    numbers; and the figures of the evaluations.
    """
    evaluation = TaskEvaluation(config, conditions(folder, num_items=5))
    states, figures = [], []
    for is_evaluated in (False, True):
        run = Run(config)
        batches = run.share(synthetic_batches(config, "mixed"))
        state: list[Any] = []
        for _ in range(3):
            state.append(run.step(batches)["loss"])
            if is_evaluated:
                figures.append(evaluation(run.model, pg_collection=run.groups, moves=lambda: None))
        state.append([chunk.training for chunk in run.model])
        state += [weight.detach().clone() for _, weight in named_parameters(run.model)]
        state += [value for value in _tensors(run.optimizer.state_dict())]
        state.append(torch.get_rng_state())
        states.append(state)
        run.close()
    return states[0], states[1], figures


class Letters(NewWords):
    """Measures what exactly was answered."""

    def measure(self, items, outcomes):
        return [{"letters": Measure(float(sum(map(ord, outcome.text))))} for outcome in outcomes]


def letters(config: MM1Config, checkpoint: Path, folder: Path, *, template: str) -> list[list[float]]:
    """What is answered without a template and in one: first between training steps, then by engines alone."""
    groups = build_process_groups(config.parallel, seed=1)
    try:
        tokenizer, model = open_tokenizer(config.data.tokenizer), _model(config, checkpoint, groups)
        asked = plan({"words": Letters(folder, num_items=3)}, Series(shots=(0,), settings=ZERO_SHOT))
        found: list[list[float]] = [[], []]
        for chat in (None, ChatTemplate(template, tokenizer, origin="test")):
            evaluation = TaskEvaluation(config, asked, chat=chat)
            found[0] += evaluation([model], pg_collection=groups, moves=lambda: None).values()
            engine = Engine(config, model, tokenizer, pg_collection=groups, chat=chat)
            [result] = run(engine, asked, copies=copies_of(engine))
            found[1] += [interval.mean for interval in overall(result.measured).values()]
        return found
    finally:
        destroy_process_groups()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def differing(one: list[Any], other: list[Any]) -> list[int]:
    """Places in which two states are not equal to the bit."""
    assert len(one) == len(other)
    same = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)]
    return [place for place, is_same in enumerate(same) if not is_same]


def compare_training(config: MM1Config, folder: Path) -> tuple[list[int], int, list[dict[str, float]]]:
    """(places that differ, places, figures): see `train_with_and_without`."""
    without, with_evaluation, figures = train_with_and_without(config, folder)
    return differing(without, with_evaluation), len(without), figures
