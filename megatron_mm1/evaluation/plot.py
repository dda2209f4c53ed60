"""The score of a task against the number of demonstrations, as a picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from megatron_mm1.evaluation.results import ALL, Result
from megatron_mm1.pages.pictures import svg

_OWN, _CONTROL = "#1f6feb", "#b35900"


def shots_plot(results: Sequence[Result]) -> bytes:
    """SVG of one task's headline with its intervals; the control dashed. The same results make the same bytes."""
    figure = Figure(figsize=(5.2, 2.9), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for label, colour, style, chosen in (
        ("with demonstrations", _OWN, "o-", [one for one in results if not one.is_control]),
        ("their images exchanged", _CONTROL, "s--", [one for one in results if one.is_control]),
    ):
        shots = [one.settings.shots for one in chosen]
        intervals = [one.figures[ALL][one.headline] for one in chosen]
        means = [one.mean for one in intervals]
        reach = [[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]]
        if chosen:
            axes.errorbar(shots, means, yerr=reach, fmt=style, color=colour, capsize=3, label=label)
    axes.set_xlabel("demonstrations")
    axes.set_ylabel(results[0].headline.replace("_", " "))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xticks(sorted({one.settings.shots for one in results}))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)
