"""The stand-in for Transformer Engine refuses what the pinned release refuses."""

import re

import pytest

from tests import te_calls

REFUSALS = {
    "unknown keyword": r"TypeError: .*linear.py: Linear.__init__: .*'hidden_size'",
    "missing argument": r"TypeError: .*LayerNormLinear.__init__: missing a required argument: 'out_features'",
    "unknown keyword of a norm's operation": r"TypeError: .*RMSNorm.__init__: .*'dtyp'",
    "unknown keyword of forward": r"TypeError: .*Linear.forward: .*'first'",
    "option without effect": r"NotImplementedError: Linear.__init__: .*ub_overlap_ag=True",
    "dtype of the input": r"TypeError: Data types for parameters must match",
    "rows, in FP8": r"ValueError: FP8 execution requires the product of all dimensions except the last",
    "rows of the weight's gradient, in FP8": r"RuntimeError: Leading dimension requirement .*rows = 8",
    "width, in FP8": r"RuntimeError: Leading dimension requirement .*out_features = 24",
    "rows of an expert, in FP8": r"RuntimeError: Leading dimension requirement .*rows = 20",
    "original input with delayed scaling": r"ValueError: DelayedScaling recipe is not supported",
    "packed without boundaries": r"AssertionError: cu_seqlens must be int32",
    "packed and no padding mask": r"AssertionError: Attention mask type must be padding",
    "heads": r"AssertionError: Keys and values must have num_gqa_group = 2",
}


@pytest.fixture(scope="module")
def raised(in_te_process):
    return in_te_process(te_calls.wrong_calls)


@pytest.mark.parametrize("call", REFUSALS)
def test_a_call_that_the_release_refuses_is_refused(raised, call):
    assert re.match(REFUSALS[call], raised[call]), raised[call]


def test_every_refusal_is_tested(raised):
    assert set(raised) == set(REFUSALS)
