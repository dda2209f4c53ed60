"""What a run may evaluate of itself: rooms above training bring it."""

from collections.abc import Callable, Mapping
from typing import Protocol

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.training.build import Model


class LiveEvaluation(Protocol):
    """Evaluates a model between two steps; the weights, and whatever else training depends on, stay as they are."""

    def __call__(
        self, model: Model, *, pg_collection: ProcessGroupCollection, moves: Callable[[], None]
    ) -> Mapping[str, float]:
        """Figures by name, on every rank; every rank calls it.

        Args:
            moves: is called from time to time, so that nobody takes the job for stuck.
        """
        ...
