"""The libraries that training uses, each imported by a Python process of its own: an import can crash or hang."""

import json
import sys
from typing import Any

from megatron_mm1.doctor.finding import Finding, ProbeError, Settings, State, output_of

_ABSENT = """
import importlib.util, json, sys
if importlib.util.find_spec({module!r}) is None:
    print(json.dumps(None))
    sys.exit()
"""
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "devices": torch.cuda.device_count() if cuda else 0,
    "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    "gloo": torch.distributed.is_gloo_available(),
}))
"""
_TRANSFORMER_ENGINE = """
import importlib.metadata
from megatron_mm1.parallel.device import transformer_engine_problem
problem, fp8 = transformer_engine_problem(), "not looked for"
if problem is None:
    from transformer_engine.pytorch import is_fp8_available
    available, reason = is_fp8_available(return_reason=True)
    fp8 = None if available else reason
print(json.dumps({"version": importlib.metadata.version("transformer-engine"), "problem": problem, "no_fp8": fp8}))
"""
_APEX = """
import torch, fused_weight_gradient_mlp_cuda
print(json.dumps({}))
"""
_DALI = """
import nvidia.dali, nvidia.dali.fn
print(json.dumps({"version": nvidia.dali.__version__}))
"""
_MEGATRON = """
import megatron_mm1.parallel, megatron.core, megatron.core.models.gpt
print(json.dumps({"version": megatron.core.__version__}))
"""
_REINSTALL = "pip install --force-reinstall --no-deps {requirement}"


def probe_torch(settings: Settings) -> list[Finding]:
    """torch and what it carries. Facts: `devices`, the CUDA devices that torch can use."""
    try:
        torch = _ask(_TORCH, "torch", settings)
    except ProbeError as error:
        return [_broken("PyTorch", error, "nothing runs", "torch")]
    if torch is None:
        return [_missing("PyTorch", "nothing runs", "make venv, or pip install 'torch>=2.11'")]
    built = f"CUDA {torch['cuda']}" if torch["cuda"] else "the CPU"
    found = f"{torch['version']}, built for {built}; CUDA devices: {torch['devices']}"
    return [
        Finding(name="PyTorch", state=State.OK, found=found, facts=torch),
        _part("cuDNN", torch["cudnn"], "attention and convolutions on a GPU"),
        _part("NCCL", torch["nccl"], "several GPUs"),
        _part("gloo", torch["gloo"] and "in torch", "several processes on a CPU"),
    ]


def probe_transformer_engine(settings: Settings) -> list[Finding]:
    """Facts: `fp8`, whether FP8 layers run here."""
    name, costs = "Transformer Engine", "layers are torch's own: slower on a GPU, and no FP8"
    try:
        engine = _ask(_TRANSFORMER_ENGINE, "transformer_engine", settings)
    except ProbeError as error:
        return [_broken(name, error, costs, "transformer-engine")]
    if engine is None:
        fix = "the Docker image, or pip install --no-build-isolation 'megatron_mm1[te]' where nvcc is"
        return [_missing(name, costs, fix)]
    if engine["problem"]:
        found = f"{engine['version']}, not usable: {engine['problem']}"
        return [Finding(name=name, state=State.FAILED, found=found, costs=costs)]
    if engine["no_fp8"]:
        found = f"{engine['version']}, without FP8: {engine['no_fp8']}"
        return [Finding(name=name, state=State.LIMITED, found=found, costs="no FP8", facts={"fp8": False})]
    return [Finding(name=name, state=State.OK, found=f"{engine['version']}, with FP8", facts={"fp8": True})]


def probe_apex(settings: Settings) -> list[Finding]:
    costs = "no gradient_accumulation_fusion: weight gradients on a GPU take another pass"
    try:
        apex = _ask(_APEX, "fused_weight_gradient_mlp_cuda", settings)
    except ProbeError as error:
        return [
            Finding(name="apex", state=State.FAILED, found=str(error), costs=costs, fix="build it against this torch")
        ]
    if apex is None:
        return [_missing("apex", costs, "the Docker image, or its build from source as in the Dockerfile")]
    return [Finding(name="apex", state=State.OK, found="its fused weight gradients load")]


def probe_dali(settings: Settings) -> list[Finding]:
    return _required("DALI", _DALI, "nvidia.dali", "images cannot be read", "nvidia-dali-cuda130", settings)


def probe_megatron_core(settings: Settings) -> list[Finding]:
    return _required("megatron-core", _MEGATRON, "megatron.core", "nothing runs", "megatron-core", settings)


def _required(name: str, code: str, module: str, costs: str, requirement: str, settings: Settings) -> list[Finding]:
    try:
        library = _ask(code, module, settings)
    except ProbeError as error:
        return [_broken(name, error, costs, requirement)]
    if library is None:
        return [_missing(name, costs, f"make venv, or pip install {requirement}")]
    return [Finding(name=name, state=State.OK, found=library["version"])]


def _ask(code: str, module: str, settings: Settings) -> Any:
    """The JSON that the code prints last, in a process of its own; None where the module is not installed."""
    parent = module.rpartition(".")[0]  # find_spec imports it
    absent = _ABSENT.format(module=parent or module) + (_ABSENT.format(module=module) if parent else "")
    try:
        output = output_of([sys.executable, "-c", absent + code], timeout_seconds=settings.timeout_seconds)
        return json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        raise ProbeError(f"importing {module} printed no answer") from None


def _missing(name: str, costs: str, fix: str) -> Finding:
    return Finding(name=name, state=State.MISSING, found="not installed", costs=costs, fix=fix)


def _broken(name: str, error: ProbeError, costs: str, requirement: str) -> Finding:
    reason = str(error).removeprefix(f"{sys.executable} ")
    fix = _REINSTALL.format(requirement=requirement)
    return Finding(name=name, state=State.FAILED, found=f"its import {reason}", costs=costs, fix=fix)


def _part(name: str, version: str | int | None, costs: str) -> Finding:
    if version:
        return Finding(name=name, state=State.OK, found=str(version))
    return Finding(
        name=name, state=State.MISSING, found="this torch has none", costs=f"no {costs}", fix="torch's build for CUDA"
    )
