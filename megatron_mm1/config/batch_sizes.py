"""How many sequences each step takes, with the ramp that a run may begin with."""

from bisect import bisect_right
from dataclasses import dataclass

from megatron_mm1.config.schema import TrainingConfig
from megatron_mm1.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """Stretches of steps of one global batch size each.

    Attributes:
        first_steps, first_sequences: step and sequence of the run (from 0) that each stretch begins with.
        sizes: its sequences per step.
    """

    first_steps: tuple[int, ...]
    first_sequences: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(training: TrainingConfig) -> "BatchSizes":
        """Those of `batch_size_ramp`, then of `global_batch_size`."""
        steps, sequences = [0], [0]
        for stage in training.batch_size_ramp:
            sequences.append(sequences[-1] + (stage.until - steps[-1]) * stage.global_batch_size)
            steps.append(stage.until)
        sizes = [*(stage.global_batch_size for stage in training.batch_size_ramp), training.global_batch_size]
        return BatchSizes(tuple(steps), tuple(sequences), tuple(sizes))

    def at(self, step: int) -> int:
        """Sequences of step `step`, counted from 0."""
        return self.sizes[bisect_right(self.first_steps, step) - 1]

    def sequences_before(self, step: int) -> int:
        """Sequences that the steps before `step` take."""
        stretch = bisect_right(self.first_steps, step) - 1
        return self.first_sequences[stretch] + (step - self.first_steps[stretch]) * self.sizes[stretch]

    def step_of(self, sequence: int) -> int:
        """The step that takes a sequence of the run, both counted from 0."""
        stretch = bisect_right(self.first_sequences, sequence) - 1
        return self.first_steps[stretch] + (sequence - self.first_sequences[stretch]) // self.sizes[stretch]

    def steps_taken(self, consumed_sequences: int) -> int:
        """How many steps have used so many sequences.

        Raises:
            UserError: that is inside of a step.
        """
        step = self.step_of(consumed_sequences)
        if self.sequences_before(step) != consumed_sequences:
            raise UserError(
                f"consumed_sequences {consumed_sequences} is inside of step {step}, which begins at "
                f"{self.sequences_before(step)} and takes training.global_batch_size {self.at(step)}: a run resumes "
                "between steps, with the global batch sizes it had (training.batch_size_ramp)"
            )
        return step
