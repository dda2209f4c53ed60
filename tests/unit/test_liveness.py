"""What rank 0 concludes from what it hears: each test tells a story of heartbeats and reads the verdict."""

from dataclasses import replace

import pytest

from megatron_mm1.faults.liveness import USER_ERROR_GRACE, RollCall, Status

WORLD_SIZE = 12
INTERVAL, SILENCE, STANDSTILL = 1.0, 60.0, 600.0
STEP = Status(rank=0, host="n0", pid=100, step=17, phase="step", moves=40, settled=True)


def status(rank, **changes):
    return replace(STEP, rank=rank, host=f"n{rank // 8}", pid=100 + rank, **changes)


@pytest.fixture
def roll():
    """All ranks in step 17, heard at time 0."""
    roll = RollCall(WORLD_SIZE, interval=INTERVAL, silence_limit=SILENCE, standstill_limit=STANDSTILL, now=0)
    hear(roll, range(WORLD_SIZE), now=0)
    return roll


def hear(roll, ranks, *, now, **changes):
    for rank in ranks:
        roll.hear(status(rank, **changes), now=now)


def others(*ranks):
    return [rank for rank in range(WORLD_SIZE) if rank not in ranks]


def test_heard_ranks_are_alive(roll):
    assert roll.verdict(now=SILENCE) is None


def test_a_silent_rank_is_dead(roll):
    hear(roll, others(3), now=SILENCE)
    assert roll.verdict(now=SILENCE) is None
    assert roll.verdict(now=SILENCE + 0.1).text == (
        "rank 3 (host n0, pid 103) died at step 17: no heartbeat for 60 s; last heard at step 17 (phase step)"
    )


def test_the_step_is_where_the_others_are(roll):
    """The dead rank's last word may be older, but nobody finishes a step without it."""
    hear(roll, others(3), now=10, step=18)
    roll.lose(3)
    assert "died at step 18: its connection closed; last heard at step 17 (phase step)" in roll.verdict(now=10).text


def test_a_nodes_ranks_are_named_together_though_last_heard_at_different_moments(roll):
    hear(roll, [8, 9], now=0.0)
    hear(roll, [10, 11], now=0.9)
    hear(roll, range(8), now=60)
    assert roll.verdict(now=60.1).text.startswith(
        "rank 8 (host n1, pid 108), rank 9 (host n1, pid 109), rank 10 (host n1, pid 110), rank 11 (host n1, pid 111) "
        "died at step 17: no heartbeat for 60 s"
    )


def test_no_more_than_eight_are_named(roll):
    hear(roll, [0], now=60)
    assert "rank 8 (host n1, pid 108), and 3 more died" in roll.verdict(now=60.1).text


def test_a_rank_that_never_came_is_named():
    roll = RollCall(2, interval=INTERVAL, silence_limit=SILENCE, standstill_limit=STANDSTILL, now=0)
    hear(roll, [0], now=60)
    assert roll.verdict(now=60.1).text.startswith("rank 1 (host unknown, pid 0) died at step 17: no heartbeat")


def test_a_rank_that_left_may_hang_up_and_be_silent(roll):
    roll.leave(3, None, now=1)
    roll.lose(3)
    hear(roll, others(3), now=100)
    assert roll.verdict(now=100) is None


def test_the_first_cause_is_the_cause(roll):
    roll.fail(3, "ValueError: bad")
    roll.lose(3)
    roll.lose(4)
    roll.fail(5, "IndexError: in its wake")
    assert roll.verdict(now=1).text == "rank 3 (host n0, pid 103) failed at step 17 (phase step): ValueError: bad"


def test_a_failed_collective_waits_for_a_heartbeat_of_every_rank(roll):
    """It may be the effect of a death that has yet to show, so each must have spoken after it."""
    roll.fail_in_collective(2, "timed out", now=30)
    hear(roll, others(7), now=32)
    hear(roll, [7], now=30.5)  # under way when it happened
    assert roll.verdict(now=32) is None
    hear(roll, [7], now=32, phase="data", moves=39)
    verdict = roll.verdict(now=32)
    assert verdict.text == (
        "a collective failed on rank 2 (host n0, pid 102) at step 17 (phase step): timed out; "
        "behind: rank 7 (host n0, pid 107) at step 17 (phase data); foremost: at step 17 (phase step)"
    )
    assert verdict.shown_by == (2,)


def test_a_death_explains_a_failed_collective(roll):
    roll.fail_in_collective(2, "connection reset", now=30)
    roll.lose(7)
    assert roll.verdict(now=30).text.startswith("rank 7 (host n0, pid 107) died")


def test_a_user_error_that_all_meet_is_theirs_to_report(roll):
    for rank in others(0):
        roll.leave(rank, "no corpus", now=rank)
    hear(roll, [0], now=USER_ERROR_GRACE)
    assert roll.verdict(now=USER_ERROR_GRACE) is None


@pytest.mark.parametrize(("broken", "now"), [(False, USER_ERROR_GRACE + 1.1), (True, 1.1)])
def test_a_user_error_of_one_rank_ends_the_others(roll, broken, now):
    """At once where they noticed, else when they have had the time to meet it too."""
    roll.leave(3, "no space", now=1)
    assert roll.verdict(now=1.1) is None
    if broken:
        roll.fail_in_collective(2, "connection closed", now=1.1)
    verdict = roll.verdict(now=now)
    assert verdict.text.endswith("pid 103) ended at step 17 (phase step) with an error: no space")
    assert verdict.exit_code == 2


def test_a_job_that_stands_still_names_who_is_behind(roll):
    hear(roll, others(5), now=1, step=18, phase="step", moves=42)
    hear(roll, [5], now=1, step=18, phase="data", moves=41)
    hear(roll, others(5), now=601.1, step=18, phase="step", moves=42)
    hear(roll, [5], now=601.1, step=18, phase="data", moves=41)
    verdict = roll.verdict(now=601.1)
    assert verdict.text == (
        "no progress for 600 s: behind: rank 5 (host n0, pid 105) at step 18 (phase data); "
        "foremost: at step 18 (phase step)"
    )
    assert verdict.shown_by == (5,)


def test_ranks_that_stand_still_together_are_not_told_apart(roll):
    hear(roll, range(WORLD_SIZE), now=601)
    verdict = roll.verdict(now=601)
    assert verdict.text == "no progress for 600 s: all ranks are at step 17 (phase step)"
    assert verdict.shown_by == tuple(range(8))


WAITING = "waiting in all_reduce at step.py:201"
ELSEWHERE = f"most {WAITING}; elsewhere: rank 5 (host n0, pid 105)"


@pytest.mark.parametrize(
    ("places", "order"),
    [
        ({5: "in read at workers.py:7"}, f"{ELSEWHERE} in read at workers.py:7"),
        (dict.fromkeys(range(5, 12), "in forward at mm1.py:9"), f"{ELSEWHERE} in forward at mm1.py:9, rank 6"),
        ({5: "waiting in recv at p2p.py:3"}, f"{ELSEWHERE} waiting in recv at p2p.py:3"),
        (dict.fromkeys(range(6), "waiting in recv at p2p.py:3"), f": 6 waiting in recv at p2p.py:3, 6 {WAITING}"),
        ({}, f": 12 {WAITING}"),
    ],
    ids=["one computes", "most compute", "another collective", "half and half", "all wait"],
)
def test_ranks_of_one_phase_are_told_apart_by_who_waits(roll, places, order):
    for rank in range(WORLD_SIZE):
        hear(roll, [rank], now=601, place=places.get(rank, WAITING))
    verdict = roll.verdict(now=601)
    assert order in verdict.text
    assert verdict.with_stacks
    late = () if not places or len(places) == 6 else tuple(places)
    assert verdict.shown_by == (late or tuple(range(8)))


@pytest.mark.parametrize(
    ("rank", "changes"),
    [(5, {"settled": False}), (5, {"phase": "checkpoint"}), (0, {"phase": "checkpoint"})],
    ids=["first step", "checkpoint", "checkpoint of rank 0"],
)
def test_what_may_take_long(roll, rank, changes):
    hear(roll, range(WORLD_SIZE), now=10_000)
    assert roll.verdict(now=10_000) is not None
    hear(roll, [rank], now=10_000, **changes)
    assert roll.verdict(now=10_000) is None


def test_one_rank_that_moves_is_progress(roll):
    hear(roll, [5], now=500, moves=41)
    hear(roll, range(WORLD_SIZE), now=1000)
    hear(roll, [5], now=1000, moves=41)
    assert roll.verdict(now=1000) is None
