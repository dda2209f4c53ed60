"""A job that fails says what each rank was at."""

import time

import pytest
import torch.distributed as dist

from megatron_mm1.parity.workers import Pool, WorkerError


def rank_1_stays_away():
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def rank_1_raises():
    if dist.get_rank() == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def test_a_rank_that_does_not_come_is_seen_in_the_stacks():
    pool = Pool(2, timeout_minutes=0.5)
    with pytest.raises(WorkerError) as raised:
        pool.run(rank_1_stays_away)
    waits, sleeps = str(raised.value).split("rank 1: ")
    assert "in barrier" in waits and "in rank_1_stays_away" in waits
    assert "in rank_1_stays_away" in sleeps and "barrier" not in sleeps
    assert not pool.alive


def test_a_rank_that_raises_ends_the_job_long_before_its_time():
    pool = Pool(2)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1: Traceback[\s\S]*broken on purpose"):
        pool.run(rank_1_raises)
    assert time.monotonic() - started < pool.timeout_seconds / 2
    assert not pool.alive
