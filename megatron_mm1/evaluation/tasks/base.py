"""What benchmarks share: a folder, two splits, a template, a metric."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Item, Split
from megatron_mm1.evaluation.metrics.cider import cider
from megatron_mm1.evaluation.metrics.vqa import vqa_accuracy
from megatron_mm1.evaluation.task import Measures, Metric, Outcome
from megatron_mm1.evaluation.tasks.files import ImageFolder, Records
from megatron_mm1.evaluation.template import (
    CAPTION,
    CAPTION_STOPPING,
    QUESTION,
    QUESTION_STOPPING,
    Stopping,
    Template,
)


class Benchmark(ABC):
    """A task over the files of one folder; see `task.Task`.

    Args:
        folder: of the benchmark's own files.

    Attributes:
        form: how items are written.
        metric: compares answers with truths; a static method.
    """

    form: Template = QUESTION
    stopping: Stopping = QUESTION_STOPPING
    metric: Metric
    headline: str = "accuracy"

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: docs/evaluation.md says what files a task reads")
        self.folder = folder
        self.images = ImageFolder(folder)

    @abstractmethod
    def evaluation_records(self) -> Records:
        """Of the split that results are reported on."""

    def training_records(self) -> Records:
        """Of the split that demonstrations come from."""
        raise UserError(f"{type(self).__name__} has no training split to take demonstrations from: use 0 shots")

    def items(self) -> Split:
        return Split.of(self.evaluation_records(), source=str(self.folder))

    def demonstrations(self) -> Split:
        return Split.of(self.training_records(), source=f"{self.folder} (training split)")

    def template(self, item: Item) -> Template:
        return self.form

    def measure(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Sequence[Measures]:
        return self.metric(items, [outcome.text for outcome in outcomes])


class CaptionBenchmark(Benchmark):
    """Captions, by CIDEr-D."""

    form = CAPTION
    stopping = CAPTION_STOPPING
    metric = staticmethod(cider)
    headline = "cider"


class OpenQuestionBenchmark(Benchmark):
    """Questions that ten people answered, by VQA accuracy."""

    metric = staticmethod(vqa_accuracy)
