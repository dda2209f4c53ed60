"""What the workers of test_health.py run: the probe, with one rank's instruments tampered with."""

import time

import torch
import torch.distributed as dist

from megatron_mm1.parallel.health import Instruments, Rates, Sizes, measure

SIZES = Sizes(matrix=128, megabytes=1, dtype=torch.float32)
DELAY = 0.3
"""Seconds; far above what a busy machine adds."""


def slow_product(left, right):
    time.sleep(DELAY)
    return torch.matmul(left, right)


def slow_all_reduce(tensor, group):
    time.sleep(DELAY)
    dist.all_reduce(tensor, group=group)


def wrong_product(left, right):
    product = torch.matmul(left, right)
    product[3, 5] += 1
    return product


TAMPERED = {
    "no": Instruments(),
    "slow product": Instruments(product=slow_product),
    "slow all-reduce": Instruments(all_reduce=slow_all_reduce),
    "wrong product": Instruments(product=wrong_product),
}


def probe(hosts: list[str], tampered: dict[int, str]) -> dict[str, Rates]:
    rank = dist.get_rank()
    return measure(hosts[rank], sizes=SIZES, instruments=TAMPERED[tampered.get(rank, "no")])
