"""What the findings mean: for what the machine suffices, which layers run, and which presets its memory holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.doctor.finding import Finding
from megatron_mm1.planning.parameters import count_parameters

STATE_BYTES = {"cpu": 4 + 4 + 8, "cuda": 2 + 4 + 4 + 8}
"""Per parameter: weight and gradient, in bf16 training the float32 master weight too, and AdamW's two moments."""


class Purpose(StrEnum):
    """What the machine is asked to be fit for."""

    QUICKSTART = "quickstart"
    TRAIN = "train"
    GPU = "gpu"

    @property
    def what(self) -> str:
        words = {"quickstart": "the quickstart", "train": "training", "gpu": "training with Transformer Engine on GPUs"}
        return words[self]


_TRAIN = ("PyTorch", "megatron-core", "DALI", "disk", "memory")
REQUIRED: Mapping[Purpose, tuple[str, ...]] = {
    Purpose.TRAIN: _TRAIN,
    Purpose.QUICKSTART: (*_TRAIN, "gloo", "demo corpus"),
    Purpose.GPU: (*_TRAIN, "GPU", "NCCL", "Transformer Engine"),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement.

    Attributes:
        reasons: why the machine is not fit for the purpose; empty where it is.
        backends: the kinds of layers that run, by name, and why not where they do not ("" where they do).
        presets: of each preset, the bytes that weights, gradients and optimizer states take.
        memory_bytes: what there is for them: of all GPUs, or of the machine where torch can use none.
    """

    purpose: Purpose
    reasons: tuple[str, ...]
    backends: Mapping[str, str]
    presets: Mapping[str, int]
    memory_bytes: int


def judge(findings: Sequence[Finding], purpose: Purpose) -> Verdict:
    by_name = {finding.name: finding for finding in findings}
    reasons = [
        f"{name}: {by_name[name].found if name in by_name else 'could not be looked for'}"
        for name in REQUIRED[purpose]
        if name not in by_name or not by_name[name].works
    ]
    facts: dict[str, Any] = {key: value for finding in findings for key, value in finding.facts.items()}
    devices = facts.get("devices", 0)
    if purpose is Purpose.GPU and not devices:
        reasons.append("PyTorch: can use no CUDA device")
    gpu_memory = sum(gpu["memory_bytes"] for gpu in facts.get("gpus", ())[:devices])
    state_bytes = STATE_BYTES["cuda" if devices else "cpu"]
    return Verdict(
        purpose=purpose,
        reasons=tuple(reasons),
        backends=_backends(by_name, devices=devices, fp8=facts.get("fp8", False)),
        presets={name: state_bytes * count_parameters(preset(name).model).total for name in PRESETS},
        memory_bytes=gpu_memory if devices else facts.get("total_bytes", 0),
    )


def _backends(findings: Mapping[str, Finding], *, devices: int, fp8: bool) -> dict[str, str]:
    broken = next((f"no {name}" for name in ("PyTorch", "megatron-core") if not _works(findings, name)), "")
    no_device = broken or ("" if devices else "torch can use no CUDA device")
    no_engine = no_device or ("" if _works(findings, "Transformer Engine") else "no Transformer Engine")
    return {
        "CPU, local layers over gloo": broken or ("" if _works(findings, "gloo") else "no gloo"),
        "CUDA, local layers": no_device,
        "CUDA, Transformer Engine's layers": no_engine,
        "CUDA, FP8": no_engine or ("" if fp8 else "Transformer Engine has no FP8 on these GPUs"),
    }


def _works(findings: Mapping[str, Finding], name: str) -> bool:
    return name in findings and findings[name].works
