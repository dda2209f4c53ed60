"""Puts a clock into a training step: around the model, the optimizer and everything that communicates.

Nothing in training knows of it: functions are replaced while `instrumented` lasts.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.bench.clock import BUBBLE, COLLECTIVES, DECODER, OPTIMIZER, TOWER, Clock
from megatron_mm1.parallel.device import device
from megatron_mm1.training import step as training_step
from megatron_mm1.training.build import Model, unwrap

_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "scatter",
)
"""Of torch.distributed; those that send objects call these."""

_CALLERS = ("megatron", "megatron_mm1", "transformer_engine")
"""Packages whose modules may have taken a function of torch.distributed when they were imported."""

Function = Callable[..., Any]


@contextmanager
def instrumented(
    model: Model, optimizer: MegatronOptimizer, clock: Clock, *, pg_collection: ProcessGroupCollection
) -> Iterator[None]:
    """Let `clock` see the parts of a training step, data excepted, while the block lasts.

    Collectives are waited for where they start, sends and receives where the schedule waits for them: it relies on
    them to go on meanwhile.
    """
    with ExitStack() as patches:
        _time_communication(patches, clock)
        for chunk in model:
            _time(patches, chunk, "forward", clock, DECODER)
            _time(patches, chunk, "zero_grad_buffer", clock, OPTIMIZER)
            if unwrap(chunk).pre_process:
                _time_tower(patches, chunk, clock)
        _time(patches, schedules, "backward_step", clock, DECODER)
        for method in ("zero_grad", "prepare_grads", "get_grad_norm", "step_with_ready_grads"):
            _time(patches, optimizer, method, clock, OPTIMIZER)
        _time(patches, training_step, "clip_grads_with_norm_", clock, OPTIMIZER)
        if pg_collection.pp.size() > 1:
            _wait_for_stages(patches, model, clock, pg_collection)
        yield


def _time(patches: ExitStack, owner: Any, name: str, clock: Clock, part: str) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.region(part):
            return function(*args, **kwargs)

    patches.enter_context(patch.object(owner, name, timed))


def _time_tower(patches: ExitStack, chunk: torch.nn.Module, clock: Clock) -> None:
    """Tower and connector: forward a call of `encode`; backward from the gradient of its result to that of the text
    embedding, if that has one.

    Autograd runs what was computed last first, and the embedding is looked up before images are encoded: between the
    two gradients it does nothing but the tower's backward pass, recomputation included, with all groups of images one
    after the other. A tower and connector that are frozen have no backward pass; under a frozen decoder the tower's
    lasts to the end.
    """
    stage = unwrap(chunk)
    encode = stage.encode

    def timed(pixels: Tensor) -> Tensor:
        with clock.region(TOWER):
            tokens = encode(pixels)
        if tokens.requires_grad:
            tokens.register_hook(lambda gradient: clock.switch(TOWER))
        return tokens

    def after_embedding(module: torch.nn.Module, args: Any, embeddings: Tensor) -> None:
        if embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: clock.switch(DECODER))

    patches.enter_context(patch.object(stage, "encode", timed))
    patches.callback(stage.language_model.embedding.register_forward_hook(after_embedding).remove)


def _wait_for_stages(patches: ExitStack, model: Model, clock: Clock, pg_collection: ProcessGroupCollection) -> None:
    """Let stages that are done with a step's microbatches wait for the others in the bubble, to which that belongs, and
    not in the first collective that they share."""
    config = unwrap(model[0]).config
    finalize = config.finalize_model_grads_func

    def wait_first(*args: Any, **kwargs: Any) -> None:
        with clock.region(BUBBLE):
            torch.distributed.all_reduce(torch.zeros(1, device=device()), group=pg_collection.pp)
        finalize(*args, **kwargs)

    patches.enter_context(patch.object(config, "finalize_model_grads_func", wait_first))


def _time_communication(patches: ExitStack, clock: Clock) -> None:
    """Replace communicating functions wherever a module refers to them."""
    homes = (torch.distributed, torch.distributed.distributed_c10d)
    replacements: dict[int, Function] = {}
    originals: list[Function] = []  # kept, so that no other object gets the id of one
    for home in homes:
        found: dict[Function, Callable[[Function, Clock], Function]] = {
            getattr(home, name): _timed_collective for name in _COLLECTIVES if hasattr(home, name)
        }
        found |= {home.isend: _timed_message, home.irecv: _timed_message, home.batch_isend_irecv: _timed_batch}
        found[torch.distributed.distributed_c10d._coalescing_manager] = _timed_coalescing
        for function, timed in found.items():
            if id(function) not in replacements:
                replacements[id(function)] = timed(function, clock)
                originals.append(function)
    callers = [
        module for name, module in sys.modules.items() if module is not None and name.partition(".")[0] in _CALLERS
    ]
    for module in [*homes, *callers]:
        for name, value in list(vars(module).items()):
            if id(value) in replacements:
                patches.enter_context(patch.object(module, name, replacements[id(value)]))


class _Finished:
    """In the place of an operation that has been waited for."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _timed_collective(function: Function, clock: Clock) -> Function:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.communication(COLLECTIVES) as outermost:
            work = function(*args, **kwargs)
            if outermost and work is not None:
                work.wait()
                return _Finished()
            return work

    return timed


class _Message:
    """A send or receive under way, which is waited for in the bubble."""

    def __init__(self, work: torch.distributed.Work, clock: Clock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *args: Any) -> bool:
        with self._clock.communication(BUBBLE):
            return self._work.wait(*args)

    def is_completed(self) -> bool:
        return self._work.is_completed()


def _timed_message(function: Function, clock: Clock) -> Function:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.communication(BUBBLE) as outermost:
            work = function(*args, **kwargs)
        return _Message(work, clock) if outermost and work is not None else work

    return timed


def _timed_batch(function: Function, clock: Clock) -> Function:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> list[Any]:
        with clock.communication(BUBBLE) as outermost:
            works = function(*args, **kwargs)
        return [_Message(work, clock) for work in works] if outermost else works

    return timed


def _timed_coalescing(function: Function, clock: Clock) -> Function:
    """The block of this context manager calls collectives, which start together at its end."""

    @contextmanager
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with clock.communication(COLLECTIVES) as outermost:
            with function(*args, **kwargs) as manager:
                yield manager
            if outermost:
                manager.wait()
                manager.works.clear()

    return timed
