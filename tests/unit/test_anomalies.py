"""Which steps are anomalies, and what is kept of them."""

import json
import math

import pytest

from megatron_mm1.faults.anomalies import AnomalyDetector
from megatron_mm1.faults.journal import Journal


def detector(**changes):
    settings = dict(nonfinite="skip", spike="rollback", spike_factor=10.0, spike_window=3, max_consecutive_skips=2)
    return AnomalyDetector(**(settings | changes))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "what"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, math.nan, "the loss is inf"),
        (1.0, math.inf, "the gradient norm is inf"),
        (1.0, math.nan, "the gradient norm is nan"),
    ],
)
def test_what_is_not_finite_is_an_anomaly_from_the_first_step_on(loss, grad_norm, what):
    anomaly = detector().judge(loss, grad_norm)
    assert (anomaly.what, anomaly.action) == (what, "skip")


def test_a_spike_is_far_above_the_median_of_a_full_window():
    judge = detector().judge
    assert judge(1.0, 1.0) is None
    assert judge(1.0, 100.0) is None  # the window is not full: the first steps are like that
    assert judge(1.0, 2.0) is None
    assert judge(1.0, 20.0) is None  # 10 times the median, not more
    anomaly = judge(1.0, 200.1)  # of 100, 2, 20
    assert (anomaly.action, anomaly.median) == ("rollback", 20.0)
    assert anomaly.what == ("the gradient norm 200.1 is more than 10 times 20, the median of the last 3 updates")


def test_what_was_not_applied_does_not_count_in_the_median():
    watch = detector(norms=[1.0, 1.0, 1.0])
    assert watch.judge(1.0, 1000.0) and watch.judge(math.nan, 1.0)
    assert watch.norms == (1.0, 1.0, 1.0)


def test_a_detector_goes_on_with_another_ones_norms():
    norms, before = [1.0, 2.0, 3.0, 2.5, 40.0, 1.0], detector()
    for norm in norms[:4]:
        before.judge(1.0, norm)
    after = detector(norms=before.norms)
    assert [before.judge(1.0, norm) for norm in norms[4:]] == [after.judge(1.0, norm) for norm in norms[4:]]


def test_without_a_policy_nothing_is_a_spike_and_nothing_is_kept():
    watch = detector(spike=None)
    assert not any(watch.judge(1.0, norm) for norm in (1.0, 1.0, 1.0, 1e9))
    assert watch.norms == ()


def test_skips_are_counted_from_the_last_good_step():
    watch = detector()
    assert watch.may_skip() and watch.may_skip() and not watch.may_skip()
    watch.judge(1.0, 1.0)
    assert watch.may_skip()


def test_a_journal_survives_a_line_that_was_cut_short(tmp_path):
    journal = Journal(tmp_path / "faults.jsonl")
    assert journal.events() == []
    journal.append({"action": "skip", "loss": math.nan, "samples": ["kö"]})
    with journal.path.open("ab") as file:
        file.write(b'{"action": "roll')
    journal.append({"action": "stop", "loss": 1.0})
    assert [(event["action"], event["loss"]) for event in journal.events()] == [("skip", None), ("stop", 1.0)]
    assert json.loads(journal.path.read_text().splitlines()[0])["samples"] == ["kö"]
