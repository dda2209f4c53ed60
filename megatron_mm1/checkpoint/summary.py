"""Tables of what a conversion would do (`--dry-run`) and of what a folder holds (`mm1 convert inspect`)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_mm1.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_mm1.checkpoint.format import OPTIMIZER_PREFIX
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_mm1.checkpoint.tensors import Plan, TensorInfo
from megatron_mm1.checkpoint.weights import component_of, open_folder
from megatron_mm1.config import ParallelConfig

_UNITS = ("B", "kB", "MB", "GB", "TB")
_SOURCES_SHOWN = 3


def plan_table(plan: Plan) -> str:
    """A line for each tensor of the result: name, shape, type, bytes, pieces, what it is made of."""
    rows = [
        (
            planned.name,
            _shape(planned.info),
            _dtype(planned.info.dtype),
            f"{planned.info.num_bytes:,}",
            str(len(planned.pieces)),
            _sources(planned.sources),
        )
        for planned in plan
    ]
    total = sum(planned.info.num_bytes for planned in plan)
    table = _table(("tensor", "shape", "type", "bytes", "pieces", "from"), rows, right=(3, 4))
    return f"{table}\n{len(plan)} tensors, {in_bytes(total)}; nothing was written"


def inspect(path: Path) -> str:
    """What a checkpoint, or another library's folder, holds.

    Raises:
        UserError: it cannot be read.
    """
    folder = open_folder(path)
    group_of = _part if isinstance(folder, MM1Checkpoint) else _module
    heading = _describe(folder)
    heading["on disk"] = in_bytes(sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file()))
    lines = [f"{name}: {value}" for name, value in heading.items()]
    groups = {name: group_of(name) for name in folder.tensors}
    return "\n".join([*lines, "", _parameters(folder.tensors, groups)])


def in_bytes(number: int) -> str:
    """A number of bytes in the unit that suits it (powers of 1000)."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _describe(folder: MM1Checkpoint | SafetensorsFolder | DistCheckpoint) -> dict[str, str]:
    if isinstance(folder, MM1Checkpoint):
        return _describe_checkpoint(folder)
    if isinstance(folder, SafetensorsFolder):
        known: dict[str, str] = {
            key: str(folder.config[key]) for key in ("model_type", "architectures") if key in folder.config
        }
        return {"folder": str(folder.path), "format": "safetensors"} | known
    return {"checkpoint": str(folder.path), "format": "megatron-core's, of another program"}


def _describe_checkpoint(checkpoint: MM1Checkpoint) -> dict[str, str]:
    metadata = checkpoint.metadata
    config = metadata.mm1_config()
    default = asdict(ParallelConfig())
    layout = {key: value for key, value in asdict(config.parallel).items() if value != default[key]}
    return {
        "checkpoint": str(checkpoint.path),
        "model": config.name,
        "format": f"{metadata.format_version}, written by megatron_mm1 {metadata.code_version}",
        "step": f"{metadata.iteration:,} ({metadata.consumed_sequences:,} sequences)",
        "holds": ", ".join([*metadata.components, *(["training state"] if metadata.has_training_state else [])]),
        "adapters": f"model.lora {asdict(config.model.lora)}" if config.model.lora else "none",
        "layout": ", ".join(f"{key} {value}" for key, value in layout.items()) or "one process",
        "tokenizer": metadata.tokenizer_fingerprint or "not known",
    }


def _parameters(tensors: Mapping[str, TensorInfo], groups: Mapping[str, str]) -> str:
    """Numbers of tensors, elements and bytes by group."""
    rows = []
    for group in [*dict.fromkeys(groups.values()), None]:
        infos = [info for name, info in tensors.items() if group in (None, groups[name])]
        rows.append(
            (
                group or "all",
                f"{len(infos):,}",
                f"{sum(torch.Size(info.shape).numel() for info in infos):,}",
                in_bytes(sum(info.num_bytes for info in infos)),
                ", ".join(sorted({_dtype(info.dtype) for info in infos})),
            )
        )
    return _table(("part", "tensors", "parameters", "size", "types"), rows, right=(1, 2, 3))


def _part(name: str) -> str:
    if name.startswith(OPTIMIZER_PREFIX):
        return f"optimizer, {component_of(name)}"
    return component_of(name) or "other"


def _module(name: str) -> str:
    """The first names of a tensor's module, up to a number: model.layers.3.mlp.weight -> model.layers."""
    return ".".join(re.split(r"\.\d+\.", name)[0].split(".")[:3]).removesuffix(".weight").removesuffix(".bias")


def _sources(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SOURCES_SHOWN])
    return f"{shown} and {len(names) - _SOURCES_SHOWN} more" if len(names) > _SOURCES_SHOWN else shown


def _shape(info: TensorInfo) -> str:
    return "x".join(map(str, info.shape)) or "scalar"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int]) -> str:
    """Aligned columns; those in `right` to the right."""
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
