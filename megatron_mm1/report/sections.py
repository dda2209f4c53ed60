"""The sections of a run's report, each HTML or, where nothing of the kind was logged, the sentence that says so."""

import html
import re
from collections.abc import Mapping
from statistics import fmean

from megatron_mm1.pages.pictures import plot
from megatron_mm1.pages.style import table
from megatron_mm1.report.charts import chart
from megatron_mm1.report.log import Line, RunLog, last_of

EXCHANGED = ", images exchanged"
_BLOCK = re.compile(r"moe block (\d+) (\w+) (load|drop rate|entropy)")


def training(log: RunLog) -> str:
    """Loss of all and by source, gradient norms, rates and speed."""
    if not log.of_kind("train"):
        return _nothing("No training step was logged.")
    sources = _starting_with(log, "loss ")
    norms = {"all": log.line("train", "grad_norm"), **_starting_with(log, "grad_norm ")}
    rates = {"decoder": log.line("train", "learning_rate"), **_starting_with(log, "learning_rate ")}
    shown = [
        _figure("Loss", {"loss": log.line("train", "lm_loss")}, unit="nats per token"),
        _figure("Loss by source", sources, unit="nats per token"),
        _figure("Gradient norm", norms, unit="before clipping"),
        _figure("Throughput", {"": log.line("train", "tokens_per_second")}, unit="tokens per second"),
        _figure("Speed of a GPU, or of a CPU process", {"": log.line("train", "tflops_per_gpu")}, unit="TFLOP/s"),
        _figure("Learning rate", _joined(rates), unit=""),
    ]
    note = "Losses and norms are those of the logged step alone, whose sequences may be of few sources."
    return f'{_grid(shown)}<p class="note">{note}</p>'


def validation(log: RunLog) -> str:
    """Held-out loss by source, with images exchanged dashed, and what looking at the right image is worth."""
    names = log.names("validation")
    own = {name: log.line("validation", name) for name in names if not name.endswith(EXCHANGED)}
    if not own:
        return _nothing("No validation was logged.")
    exchanged = {name: log.line("validation", name + EXCHANGED) for name in own}
    rows = [("source", "loss", "exchanged", "gain")]
    for name, line in own.items():
        last, other = last_of(line), last_of(exchanged[name])
        gain = "" if last is None or other is None else f"{other - last:.4f}"
        rows.append((name, _shown(last), _shown(other), gain))
    note = (
        "Dashed: the same examples with each image replaced by another. Where the two are equal, the model does not "
        "look at its images. Below, the last validation, nats per token; the gain is what the right image is worth."
    )
    picture = plot(chart(own, unit="nats per token", dashed=exchanged), alt="held-out loss by source")
    return f'{picture}<p class="note">{note}</p>{table(rows)}'


def experts(log: RunLog) -> str:
    """How evenly experts are used, by modality; empty for a model without."""
    found = [match for name in log.names("train") if (match := _BLOCK.fullmatch(name))]
    if not found:
        return ""
    modalities = list(dict.fromkeys(match[2] for match in found))
    shown = []
    for measure, title, unit in (
        ("load", "Load of the busiest expert", "times an even share"),
        ("drop rate", "Choices that capacity did not allow", "share"),
        ("entropy", "Entropy of the router", "nats"),
    ):
        lines = {modality: _over_blocks(log, modality, measure) for modality in modalities}
        shown.append(_figure(title, lines, unit=unit))
    blocks = sorted({int(match[1]) for match in found})
    rows = [("block", *(f"{modality} load" for modality in modalities))]
    for block in blocks:
        loads = [log.last("train", f"moe block {block} {modality} load") for modality in modalities]
        rows.append((str(block), *map(_shown, loads)))
    note = '<p class="note">Means over blocks; below, the last load of each block, where 1 is even.</p>'
    return f"<h2>Experts</h2>{_grid(shown)}{note}{table(rows)}"


def evaluations(log: RunLog) -> str:
    """Tasks that the run evaluated while it trained; empty where it did not."""
    names = [name for name in log.names("evaluation") if not name.endswith(", not answered")]
    shown = [_figure(name, {"": log.line("evaluation", name)}, unit=name.rpartition(", ")[2]) for name in names]
    return f"<h2>Evaluation while training</h2>{_grid(shown)}" if shown else ""


def memory(log: RunLog) -> str:
    """Planned beside measured memory; empty where it was not logged."""
    figures = log.of_kind("memory")
    if not figures:
        return ""
    _, last = max(figures.items())
    ranks = [name.removeprefix("measured ") for name in last if name.startswith("measured ")]
    rows = [("pipeline rank", "planned, GiB", "measured, GiB")]
    rows += [(rank, _shown(last.get(f"planned {rank}")), _shown(last.get(f"measured {rank}"))) for rank in ranks]
    return f"<h2>Memory of a rank</h2>{table(rows)}"


def summary(log: RunLog) -> str:
    """The last figures in a table."""
    wanted = {
        "lm_loss": "loss",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens per second",
        "data_wait_ms": "waiting for data, ms a step",
        "skipped_iterations": "steps skipped",
        "nan_iterations": "steps that were not numbers",
    }
    values = {label: log.last("train", name) for name, label in wanted.items()}
    rows = [("last logged", ""), *((label, _shown(value)) for label, value in values.items() if value is not None)]
    return table(rows) if len(rows) > 1 else ""


def _starting_with(log: RunLog, prefix: str) -> dict[str, Line]:
    names = [name for name in log.names("train") if name.startswith(prefix)]
    return {name.removeprefix(prefix): log.line("train", name) for name in names}


def _joined(lines: Mapping[str, Line]) -> dict[str, Line]:
    """Equal lines as one, which would else hide each other."""
    labels: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for label, line in lines.items():
        labels.setdefault(tuple(line.items()), []).append(label)
    return {", ".join(same): dict(points) for points, same in labels.items()}


def _figure(title: str, lines: Mapping[str, Line], *, unit: str) -> str:
    shown = {label: line for label, line in lines.items() if line}
    if not shown:
        return ""
    picture = plot(chart(shown, unit=unit), alt=f"{title} by step")
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}</figure>"


def _grid(figures: list[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _over_blocks(log: RunLog, modality: str, measure: str) -> Line:
    """Mean over the blocks with experts."""
    names = [name for name in log.names("train") if _BLOCK.fullmatch(name) and name.endswith(f" {modality} {measure}")]
    lines = [log.line("train", name) for name in names]
    steps = sorted({step for line in lines for step in line})
    return {step: fmean(line[step] for line in lines if step in line) for step in steps}


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _nothing(sentence: str) -> str:
    return f'<p class="note">{sentence}</p>'
