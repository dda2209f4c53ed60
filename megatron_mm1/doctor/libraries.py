"""The libraries that training uses, imported by other processes (`imports`)."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from megatron_mm1.doctor.finding import Finding, Settings, State

Answer = Mapping[str, Any]


def probe_torch(settings: Settings) -> list[Finding]:
    """torch and what rests on it. Facts: `devices`, the CUDA devices torch can use; `fp8`, whether FP8 layers run."""
    modules = ("torch", "fused_weight_gradient_mlp_cuda", "transformer_engine", "megatron.core")
    torch, apex, engine, megatron = ask(modules, timeout_seconds=settings.timeout_seconds)
    return [*_torch(torch), _megatron_core(megatron), _transformer_engine(engine), _apex(apex)]


def probe_dali(settings: Settings) -> list[Finding]:
    (dali,) = ask(["nvidia.dali"], timeout_seconds=settings.timeout_seconds)
    name, costs = "DALI", "images cannot be read"
    fault = _fault(name, dali, costs=costs, fix="make venv, or pip install nvidia-dali-cuda130")
    return [fault or Finding(name=name, state=State.OK, found=dali["facts"]["version"])]


def _torch(answer: Answer) -> list[Finding]:
    fault = _fault("PyTorch", answer, costs="nothing runs", fix="make venv, or pip install 'torch>=2.11'")
    if fault is not None:
        return [fault]
    torch = answer["facts"]
    built = f"CUDA {torch['cuda']}" if torch["cuda"] else "the CPU"
    found = f"{torch['version']}, built for {built}; CUDA devices: {torch['devices']}"
    return [
        Finding(name="PyTorch", state=State.OK, found=found, facts=torch),
        _cudnn(torch),
        _part("NCCL", torch["nccl"], "several GPUs"),
        _part("gloo", torch["gloo"] and "in torch", "several processes on a CPU"),
    ]


def _cudnn(torch: Mapping[str, Any]) -> Finding:
    costs = "attention and convolutions on a GPU"
    if "cudnn_problem" not in torch:
        return _part("cuDNN", torch["cudnn"], costs)
    fix = "one cuDNN for torch and Transformer Engine, see docs/install.md"
    return Finding(name="cuDNN", state=State.FAILED, found=torch["cudnn_problem"], costs=f"no {costs}", fix=fix)


def _part(name: str, version: str | int | None, costs: str) -> Finding:
    if version:
        return Finding(name=name, state=State.OK, found=str(version))
    fix = "torch's build for CUDA"
    return Finding(name=name, state=State.MISSING, found="this torch has none", costs=f"no {costs}", fix=fix)


def _megatron_core(answer: Answer) -> Finding:
    name = "megatron-core"
    fault = _fault(name, answer, costs="nothing runs", fix="make venv, or pip install megatron-core")
    return fault or Finding(name=name, state=State.OK, found=answer["facts"]["version"])


def _transformer_engine(answer: Answer) -> Finding:
    name, costs = "Transformer Engine", "layers are torch's own: slower on a GPU, and no FP8"
    fix = "the Docker image, or pip install --no-build-isolation 'megatron_mm1[te]' where nvcc is"
    fault = _fault(name, answer, costs=costs, fix=fix)
    if fault is not None:
        return fault
    engine = answer["facts"]
    if not engine["fp8"]:
        found = f"{engine['version']}, without FP8: {engine['no_fp8']}"
        return Finding(name=name, state=State.LIMITED, found=found, costs="no FP8", facts={"fp8": False})
    return Finding(name=name, state=State.OK, found=f"{engine['version']}, with FP8", facts={"fp8": True})


def _apex(answer: Answer) -> Finding:
    costs = "no gradient_accumulation_fusion: weight gradients on a GPU take another pass"
    fix = "the Docker image, or its build from source, against this torch, as in the Dockerfile"
    fault = _fault("apex", answer, costs=costs, fix=fix)
    return fault or Finding(name="apex", state=State.OK, found="its fused weight gradients load")


def _fault(name: str, answer: Answer, *, costs: str, fix: str) -> Finding | None:
    if not answer["installed"]:
        return Finding(name=name, state=State.MISSING, found="not installed", costs=costs, fix=fix)
    if "problem" in answer:
        return Finding(name=name, state=State.FAILED, found=answer["problem"], costs=costs, fix=fix)
    return None


def ask(modules: Sequence[str], *, timeout_seconds: float) -> list[Answer]:
    """What came of importing each of the modules; the others need the first.

    One process imports them all, and takes as long as one. Where an import ends or hangs it, another goes on behind.
    """
    answers: list[Answer] = []
    while len(answers) < len(modules):
        if answers and "problem" in answers[0]:
            answers.append({"installed": True, "problem": f"needs {modules[0]}"})
            continue
        said, end = _import_in_turn(modules[len(answers) :], timeout_seconds=timeout_seconds)
        answers += said
        if end:
            answers.append({"installed": True, "problem": f"its import {end}"})
    return answers


def _import_in_turn(modules: Sequence[str], *, timeout_seconds: float) -> tuple[list[Answer], str]:
    """The answers of one process, each within the limit, and what kept it from the next; "" where there is none."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_mm1.doctor.imports", *modules],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
    answers: list[Answer] = []
    try:
        for _ in modules:
            line = lines.get(timeout=timeout_seconds)
            if not line:
                return answers, _end_of(process)
            answers.append(json.loads(line))
    except queue.Empty:
        return answers, f"did not end within {timeout_seconds:g} s"
    finally:
        # Not waited for: a process that hangs in a driver does not die of the signal.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return answers, ""


def _forward(process: subprocess.Popen[bytes], lines: "queue.SimpleQueue[bytes]") -> None:
    """Its output line by line, and an empty one behind it."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(b"")


def _end_of(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended the process with exit code {code}"
