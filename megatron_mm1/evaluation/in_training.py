"""Evaluation of a model that is being trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.data.chat import Chat, ChatTemplate
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.evaluation.fewshot import FewShot
from megatron_mm1.evaluation.plan import Condition, Series, plan
from megatron_mm1.evaluation.results import overall
from megatron_mm1.evaluation.runner import copies_of, run
from megatron_mm1.evaluation.task import build_task
from megatron_mm1.inference.engine import Engine, check_askable
from megatron_mm1.training.build import Model


@dataclass(frozen=True)
class TaskEvaluation:
    """A `training.live.LiveEvaluation`.

    Attributes:
        conditions: what is asked each time.
        chat: see `Engine`.
    """

    config: MM1Config
    conditions: Sequence[Condition]
    chat: ChatTemplate | None = None

    def __call__(
        self, model: Model, *, pg_collection: ProcessGroupCollection, moves: Callable[[], None]
    ) -> dict[str, float]:
        """The mean of each measure over all items, and how many were not answered where there are any.

        Raises:
            UserError: nothing of a condition can be answered.
        """
        # Made anew each time: an engine keeps what images were to the weights it had.
        tokenizer = open_tokenizer(self.config.data.tokenizer)
        engine = Engine(self.config, model, tokenizer, pg_collection=pg_collection, chat=self.chat)
        means = {}
        for condition, result in zip(
            self.conditions,
            run(engine, self.conditions, copies=copies_of(engine), on_chunk=moves),
            strict=True,
        ):
            for name, interval in overall(result.measured).items():
                means[f"{condition.label}, {name}"] = interval.mean
            if result.refused:
                means[f"{condition.label}, not answered"] = len(result.refused)
        return means


def live_evaluation(config: MM1Config) -> TaskEvaluation:
    """What `config.evaluation` asks for; its data and chat template are read here, before training begins.

    Raises:
        UserError: a task, its data or the template cannot be used, or the model cannot be asked while it is trained.
    """
    check_askable(config)
    settings = config.evaluation
    tasks = {
        name: build_task(name, Path(settings.data[name]) if name in settings.data else None) for name in settings.tasks
    }
    series = Series(shots=settings.shots, settings=FewShot(seed=settings.seed))
    chat = Chat.of(settings)
    template = None if chat is None else chat.open(open_tokenizer(config.data.tokenizer))
    return TaskEvaluation(config, plan(tasks, series, limit=settings.limit), chat=template)
