"""Who counts as slow."""

from megatron_mm1.faults.stragglers import Work, stragglers


def slow(*seconds, peers=None, factor=1.5):
    peers = peers or [0] * len(seconds)
    works = [Work(str(rank), stage, time) for rank, (stage, time) in enumerate(zip(peers, seconds, strict=True))]
    return [int(straggler.work.who) for straggler in stragglers(works, factor=factor)]


def test_who_exceeds_the_median_of_the_others():
    assert slow(1.0, 1.0, 1.6, 1.0) == [2]
    assert slow(1.0, 1.0, 1.5, 1.0) == []
    assert slow(3.0, 1.0, 9.0, 1.0, 1.0) == [2, 0]


def test_one_of_two_ranks_can_be_slow():
    assert slow(1.0, 1.6) == [1]


def test_pipeline_stages_are_not_compared():
    assert slow(4.0, 4.0, 1.0, 1.0, peers=[0, 0, 1, 1]) == []
    assert slow(4.0, 1.0, peers=[0, 1]) == []


def test_milliseconds_are_not_worth_a_line():
    assert slow(0.01, 0.05) == []
