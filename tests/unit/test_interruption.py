"""Signals while a run goes on, and the ranks' agreement on them, in one process; runs that end are tests/parallel's."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from megatron_mm1.training.interruption import Interruption, interruptible


def handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Handlers of SIGTERM and SIGUSR1 that are not the system's, which would end the tests."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_counts_from_the_next_step_on(own_handlers: None, number: signal.Signals) -> None:
    with interruptible() as interruption:
        interruption.begin()
        signal.raise_signal(number)
        assert interruption.received is number
        assert not interruption.agreed()
        for _ in range(2):
            interruption.begin()
            assert interruption.agreed()


def test_two_signals_are_noted_and_their_handlers_come_back(own_handlers: None) -> None:
    """Also after a run that failed."""
    before = handlers()
    with pytest.raises(MemoryError), interruptible():
        assert {number for number, handler in handlers().items() if handler != before[number]} == {
            signal.SIGTERM,
            signal.SIGUSR1,
        }
        raise MemoryError
    assert handlers() == before


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Interruption]:
    """Two ranks that have connected."""
    store = HashStore()
    with ThreadPoolExecutor(2) as executor:
        gloo = executor.map(lambda rank: ProcessGroupGloo(store, rank, 2, timedelta(seconds=10)), range(2))
        ends = list(gloo)
    ranks = [Interruption(), Interruption()]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank, end in zip(ranks, ends, strict=True):
        monkeypatch.setattr(torch.distributed, "new_group", lambda *, backend, end=end: end)
        rank.connect()
    return ranks


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_is_agreed_on_by_both(ranks: list[Interruption], signalled: int) -> None:
    for expected in (False, True):
        for rank in ranks:
            rank.begin()
        assert [rank.agreed() for rank in ranks] == [expected] * 2
        ranks[signalled].receive(signal.SIGUSR1, None)


def test_only_the_answer_waits_for_the_other_rank(ranks: list[Interruption]) -> None:
    first, second = ranks
    first.begin()
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(first.agreed)
        with pytest.raises(TimeoutError):
            answer.result(timeout=0.2)
        second.receive(signal.SIGTERM, None)
        second.begin()
        assert answer.result() and second.agreed()
