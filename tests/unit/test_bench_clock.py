"""The stopwatch of `mm1 bench step`, on a device and in a time of its own."""

import pytest

from megatron_mm1.bench.clock import BUBBLE, COLLECTIVES, DECODER, OTHER, TOWER, Clock


class Device:
    """Does `work` later, when it is waited for, and takes a second for each."""

    def __init__(self):
        self.now = self.queued = 0.0
        self.clock = Clock(self.synchronize, timer=lambda: self.now)

    def work(self, seconds):
        self.queued += seconds

    def synchronize(self):
        self.now += self.queued
        self.queued = 0.0

    @property
    def measured(self):
        return {part: seconds for part, seconds in self.clock.seconds.items() if seconds}


@pytest.fixture
def device():
    return Device()


def test_a_moment_counts_for_the_innermost_region_and_outside_of_all_for_other(device):
    with device.clock.running():
        device.work(1)
        with device.clock.region(DECODER):
            device.work(2)
            with device.clock.region(TOWER):
                device.work(4)
            device.work(8)
        device.work(16)
    assert device.measured == {OTHER: 17, DECODER: 10, TOWER: 4}


def test_work_queued_before_the_clock_runs_or_after_it_stops_is_not_counted(device):
    device.work(1)
    with device.clock.running():
        device.work(2)
    with device.clock.region(TOWER):
        device.work(4)
    device.synchronize()
    assert device.measured == {OTHER: 2}


def test_a_region_can_go_on_as_another_part(device):
    with device.clock.running(), device.clock.region(DECODER):
        device.work(1)
        device.clock.switch(TOWER)
        device.work(2)
        with device.clock.region(COLLECTIVES):
            device.work(4)
        device.work(8)
        device.clock.switch(DECODER)
        device.work(16)
    assert device.measured == {DECODER: 17, TOWER: 10, COLLECTIVES: 4}


@pytest.mark.parametrize(("outer", "inner"), [(BUBBLE, COLLECTIVES), (COLLECTIVES, BUBBLE)])
def test_communication_inside_communication_is_part_of_it(device, outer, inner):
    with device.clock.running(), device.clock.communication(outer) as is_outermost:
        assert is_outermost
        with device.clock.communication(inner) as is_outermost:
            assert not is_outermost
            device.work(1)
        device.work(2)
    assert device.measured == {outer: 3}


def test_communication_is_not_the_clocks_business_while_it_does_not_run(device):
    with device.clock.communication(COLLECTIVES) as is_outermost:
        assert not is_outermost


def test_an_error_ends_its_regions(device):
    with device.clock.running():
        with pytest.raises(ValueError), device.clock.region(DECODER), device.clock.region(TOWER):
            device.work(1)
            raise ValueError
        device.work(2)
    assert device.measured == {TOWER: 1, OTHER: 2}
