"""What an evaluation asks: every item of every task, in every way of presenting it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.fewshot import ZERO_SHOT, FewShot, Request, demonstration_pool, request
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.task import Refusal, Task


@dataclass(frozen=True)
class Series:
    """Ways of presenting items that are evaluated side by side.

    Attributes:
        shots: numbers of demonstrations.
        with_control: evaluate again, for each number of at least two, with the demonstrations' images exchanged: what
            is lost by it is what the model gets from them.
        settings: everything else.

    Raises:
        UserError: no number of shots, or a control without demonstrations to exchange.
    """

    shots: tuple[int, ...] = (0,)
    with_control: bool = False
    settings: FewShot = ZERO_SHOT

    def __post_init__(self) -> None:
        if not self.shots:
            raise UserError("no number of shots: give at least one, 0 for none")
        if self.with_control and max(self.shots) < 2:
            raise UserError(
                f"the control exchanges the images of demonstrations, of which there are {max(self.shots)}: "
                "ask for 2 shots or more, or leave the control out"
            )

    def ways(self) -> tuple[FewShot, ...]:
        """Each way once, from few shots to many, a control behind what it controls."""
        ways = []
        for shots in sorted(set(self.shots)):
            ways.append(replace(self.settings, shots=shots))
            if self.with_control and shots > 1:
                ways.append(replace(ways[-1], permute_images=True))
        return tuple(ways)


ZERO_SHOT_SERIES = Series()


@dataclass(frozen=True)
class Condition:
    """A task's items in one way of presenting them.

    Attributes:
        name: of the task.
        left_out: how many of the task's records could not be used, by reason.
        asked: what is run for each item, or why nothing can be.
    """

    name: str
    task: Task
    settings: FewShot
    left_out: Mapping[str, int]
    asked: tuple[tuple[Item, Request | Refusal], ...]

    @property
    def label(self) -> str:
        """For people."""
        control = ", images exchanged" if self.settings.permute_images else ""
        return f"{self.name}, {self.settings.shots} shots{control}"


def plan(tasks: Mapping[str, Task], series: Series, *, limit: int | None = None) -> tuple[Condition, ...]:
    """The conditions of an evaluation; every process comes to the same.

    Args:
        limit: items per task at most.

    Raises:
        UserError: a task's data is missing or of another layout, or not one of its items can be asked.
    """
    return tuple(condition for name, task in tasks.items() for condition in _conditions(name, task, series, limit))


def _conditions(name: str, task: Task, series: Series, limit: int | None) -> list[Condition]:
    split = task.items()
    conditions, most = [], max(series.ways(), key=lambda way: way.shots)
    pool = demonstration_pool(task, most)  # read once: which demonstrations it holds does not depend on how many
    for settings in series.ways():
        asked = tuple((item, _request(item, task, settings, pool)) for item in split.items[:limit])
        conditions.append(Condition(name, task, settings, split.counts(), asked))
        refused = [one for _, one in asked if isinstance(one, Refusal)]
        if len(refused) == len(asked):
            raise UserError(f"{conditions[-1].label}: none of {len(asked)} items can be asked: {refused[0].message}")
    return conditions


def _request(item: Item, task: Task, settings: FewShot, pool: tuple[Item, ...]) -> Request | Refusal:
    try:
        return request(item, task, settings, pool=pool)
    except UserError as error:
        return Refusal(str(error))
