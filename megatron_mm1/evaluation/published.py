"""MM1's published few-shot results [P], to set a run's beside."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mm1.evaluation.bootstrap import Interval

SOURCE = (
    "McKinzie et al. 2024, MM1: Methods, Analysis & Insights from Multimodal LLM Pre-training, arXiv 2403.09611. "
    "A figure depends on prompts, demonstrations and resolution, which the paper does not give in full: compare with "
    "care."
)


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        model: as the paper calls it.
        task: its name here.
        shots: demonstrations.
        value: CIDEr x 100, or accuracy in percent.
        protocol: what else the figure depends on.
    """

    model: str
    task: str
    shots: int
    value: float
    protocol: str = ""


MEASURES: Mapping[str, str] = {
    "coco": "cider",
    "nocaps": "cider",
    "textcaps": "cider",
    "vqav2": "accuracy",
    "textvqa": "accuracy",
    "vizwiz": "accuracy",
    "okvqa": "accuracy",
    "mathvista": "accuracy",
}
"""Which measure of a task the paper reports."""

_EIGHT_SHOTS = {
    "MM1-3B": (114.6, 104.7, 88.8, 63.6, 44.6, 46.4, 48.4),
    "MM1-7B": (116.3, 106.6, 88.2, 63.6, 46.3, 45.3, 51.4),
    "MM1-30B": (123.1, 111.6, 92.9, 70.9, 49.4, 49.9, 58.3),
}
_CHAT, _REASONED = "MM1-30B-Chat", "chain of thought"
PUBLISHED: tuple[Published, ...] = (
    *(
        Published(model, task, 8, value)
        for model, values in _EIGHT_SHOTS.items()
        for task, value in zip(list(MEASURES)[:7], values, strict=True)
    ),
    Published(_CHAT, "mathvista", 0, 39.4),
    Published(_CHAT, "mathvista", 4, 41.9, _REASONED),
    Published(_CHAT, "mathvista", 8, 44.4, f"{_REASONED}, mixed resolution"),
)


def beside_published(results: Mapping[str, Mapping[str, Interval]], *, shots: int, name: str) -> list[list[str]]:
    """A table of a run's figures beside MM1's with as many shots, heading first; tasks the paper has none for are left
    out.

    Args:
        results: measures over all items, by task.
        shots: of the run.
        name: of the run, for the heading.
    """
    figures = {(one.model, one.task): one for one in PUBLISHED if one.shots == shots}
    tasks = [task for task in MEASURES if MEASURES[task] in results.get(task, {})]
    models = list(dict.fromkeys(model for model, task in figures if task in tasks))
    rows = [[f"task, {shots} shots", "measure", name, *models]]
    for task in tasks:
        published = [_told(figures.get((model, task))) for model in models]
        rows.append([task, MEASURES[task], results[task][MEASURES[task]].percent(), *published])
    return rows


def _told(figure: Published | None) -> str:
    if figure is None:
        return ""
    return f"{figure.value:.1f} ({figure.protocol})" if figure.protocol else f"{figure.value:.1f}"
