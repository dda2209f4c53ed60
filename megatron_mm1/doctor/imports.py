"""`python -m megatron_mm1.doctor.imports MODULE..` imports libraries in turn and says after each what came of it.

A program of its own, since an import can crash or hang; what it has said by then counts. Every line of its output is a
JSON object: `installed`, and where it is, `facts`, or `problem`, why it does not work.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def _torch() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count() if cuda else 0,
        **_cudnn(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


def _cudnn() -> dict[str, Any]:
    import torch

    if torch.version.cuda is None:
        return {"cudnn": None}
    try:
        return {"cudnn": torch.backends.cudnn.version()}
    except RuntimeError as error:  # another one than torch was built with is found first: torch itself still works
        return {"cudnn": None, "cudnn_problem": str(error).split(". ")[0]}


def _apex() -> dict[str, Any]:
    import torch  # noqa: F401  # first: its libraries are the module's too

    importlib.import_module("fused_weight_gradient_mlp_cuda")
    return {}


def _transformer_engine() -> dict[str, Any]:
    from megatron_mm1.parallel.device import transformer_engine_problem

    problem = transformer_engine_problem()
    if problem is not None:
        raise ImportError(problem)
    from transformer_engine.pytorch import is_fp8_available

    available, reason = is_fp8_available(return_reason=True)
    version = importlib.metadata.version("transformer-engine")
    return {"version": version, "fp8": available, "no_fp8": "" if available else reason}


def _megatron_core() -> dict[str, Any]:
    import megatron.core.models.gpt  # noqa: F401  # what is used of it

    import megatron_mm1.parallel  # noqa: F401  # first: it readies the process

    return {"version": importlib.metadata.version("megatron-core")}  # its own adds the commit of where this runs


def _dali() -> dict[str, Any]:
    import nvidia.dali
    import nvidia.dali.fn

    return {"version": nvidia.dali.__version__}


LOOKS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "fused_weight_gradient_mlp_cuda": _apex,  # before megatron_mm1.parallel, which puts a stand-in under this name
    "transformer_engine": _transformer_engine,
    "megatron.core": _megatron_core,
    "nvidia.dali": _dali,
}


def look(module: str) -> dict[str, Any]:
    """One line of the output."""
    try:
        if not _is_installed(module):
            return {"installed": False}
        return {"installed": True, "facts": LOOKS[module]()}
    except Exception as error:
        text = str(error).strip().splitlines() or ["no message"]
        return {"installed": True, "problem": f"{type(error).__name__}: {text[0]}"}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    for module in sys.argv[1:]:
        print(json.dumps(look(module)), file=answers, flush=True)


if __name__ == "__main__":
    main()
