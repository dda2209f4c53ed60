"""Process groups on a CPU."""

import os

import torch

from tests.parallel import test_gloo as jobs


def threads_of_groups(count: int) -> int:
    """How many threads so many groups start."""
    before = len(os.listdir("/proc/self/task"))
    groups = [torch.distributed.new_group() for _ in range(count)]
    started = len(os.listdir("/proc/self/task")) - before
    for group in groups:
        total = torch.ones(2)
        torch.distributed.all_reduce(total, group=group)
        assert total.tolist() == [torch.distributed.get_world_size()] * 2
        torch.distributed.destroy_process_group(group)
    return started


def test_groups_share_a_device(pool):
    """A group has two threads that sleep; a device of its own would be a third, which wakes up all the time."""
    pool(2).run(jobs.threads_of_groups, 1)
    assert pool(2).run(jobs.threads_of_groups, 10) == [20, 20]
