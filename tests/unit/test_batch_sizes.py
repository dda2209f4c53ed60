"""Batch-size ramps: steps and sequences of a run."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.config import TrainingConfig
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import BatchSizeStage
from megatron_mm1.errors import UserError


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    lengths = draw(st.lists(st.integers(1, 5), max_size=4))
    sizes = st.integers(1, 9)
    stages = [
        BatchSizeStage(until=until, global_batch_size=draw(sizes)) for until in itertools.accumulate(lengths, initial=0)
    ]
    return TrainingConfig(global_batch_size=draw(sizes), batch_size_ramp=tuple(stages[1:]))


def sizes_of(training: TrainingConfig, steps: int) -> list[int]:
    """Step by step, from what the settings say."""
    sizes = []
    for step in range(steps):
        stage = next((stage for stage in training.batch_size_ramp if step < stage.until), training)
        sizes.append(stage.global_batch_size)
    return sizes


@given(ramps())
def test_steps_and_sequences_are_those_of_counting(training: TrainingConfig) -> None:
    batch_sizes, expected = BatchSizes.of(training), sizes_of(training, 30)
    assert [batch_sizes.at(step) for step in range(30)] == expected
    begins = list(itertools.accumulate(expected, initial=0))
    assert [batch_sizes.sequences_before(step) for step in range(31)] == begins
    step_of_sequence = [step for step, size in enumerate(expected) for _ in range(size)]
    assert [batch_sizes.step_of(sequence) for sequence in range(len(step_of_sequence))] == step_of_sequence
    assert [batch_sizes.steps_taken(sequences) for sequences in begins] == list(range(31))


def test_a_run_does_not_stop_inside_of_a_step() -> None:
    ramp = (BatchSizeStage(until=3, global_batch_size=4),)
    with pytest.raises(UserError, match=r"sequences 18 is inside of step 3, which begins at 12 and takes .* 8"):
        BatchSizes.of(TrainingConfig(global_batch_size=8, batch_size_ramp=ramp)).steps_taken(18)
