"""The work of an evaluation, shared out over the copies of the model and done once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from megatron_mm1.evaluation.answers import Responder, outcomes_of
from megatron_mm1.evaluation.fewshot import Request
from megatron_mm1.evaluation.journal import Journal, Outcomes, digest_of_chunk
from megatron_mm1.evaluation.plan import Condition
from megatron_mm1.evaluation.task import Refusal

_CHUNK = 32
"""Requests that are answered, noted and shared out together."""


@dataclass(frozen=True)
class Copies:
    """The copies of a model that a job holds.

    Attributes:
        count: how many.
        index: the one that this rank belongs to.
        speaks: true on one rank of each.
    """

    count: int = 1
    index: int = 0
    speaks: bool = True


ONE_COPY = Copies()


@dataclass(frozen=True)
class _Chunk:
    condition: Condition
    requests: tuple[Request, ...]
    digest: str


def ask(
    responder: Responder,
    conditions: Sequence[Condition],
    *,
    copies: Copies,
    journal: Journal | None = None,
    on_chunk: Callable[[], None] | None = None,
) -> list[Outcomes]:
    """What the model makes of each item of each condition, on every rank; all ranks call this.

    Args:
        copies: of the model; each answers its share of the chunks. Which chunks there are does not depend on them.
        journal: what has been answered before and need not be again, and where new answers are noted.
        on_chunk: called after each chunk, in place of a progress bar.
    """
    chunks = list(_chunks(conditions))
    known = _from_rank_0(journal.read() if journal is not None and _rank() == 0 else {})
    # Each once, though two conditions may ask the same (a task given under two names, say).
    waiting = list({chunk.digest: chunk for chunk in chunks if chunk.digest not in known}.values())
    share = waiting[copies.index :: copies.count]
    answered: dict[str, Outcomes] = {}
    is_silent = None if on_chunk is None and _rank() == 0 else True  # None: shown on a terminal only
    with tqdm(total=sum(len(chunk.requests) for chunk in share), unit="item", disable=is_silent) as progress:
        for chunk in share:
            progress.set_description(chunk.condition.label)
            condition = chunk.condition
            outcomes = tuple(outcomes_of(responder, chunk.requests, condition.task, condition.settings))
            answered[chunk.digest] = outcomes
            if journal is not None and copies.speaks:
                journal.add(chunk.digest, outcomes, writer=copies.index)
            progress.update(len(chunk.requests))
            if on_chunk is not None:
                on_chunk()
    for part in _gathered(answered if copies.speaks else {}):
        known |= part
    outcomes_in_order = iter([outcome for chunk in chunks for outcome in known[chunk.digest]])
    return [
        tuple(one if isinstance(one, Refusal) else next(outcomes_in_order) for _, one in condition.asked)
        for condition in conditions
    ]


def _chunks(conditions: Sequence[Condition]) -> Iterator[_Chunk]:
    for condition in conditions:
        requests = [one for _, one in condition.asked if isinstance(one, Request)]
        for start in range(0, len(requests), _CHUNK):
            together = tuple(requests[start : start + _CHUNK])
            settings = condition.settings
            digest = digest_of_chunk(
                together, settings.stopping(condition.task), high_resolution=settings.high_resolution
            )
            yield _Chunk(condition, together, digest)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _from_rank_0(known: dict[str, Outcomes]) -> dict[str, Outcomes]:
    if not torch.distributed.is_initialized():
        return known
    box: list[Any] = [known]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(answered: dict[str, Outcomes]) -> list[dict[str, Outcomes]]:
    if not torch.distributed.is_initialized():
        return [answered]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, answered)
    return parts
