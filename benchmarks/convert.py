"""Conversions of a checkpoint against copying it: `mm1 convert import`, `export` and `reshard`.

    OMP_NUM_THREADS=1 python benchmarks/convert.py

A Llama of about 2 GB with random bf16 weights is written to a temporary folder and imported; the round trip is compared
bit for bit before anything is timed. Then each conversion takes turns with `cp` of its source, both including fsync of
what was written: the ratio is that of neighbours, the median counts, and sources are in the page cache for both. Every
conversion runs in a process of its own, which has imported its modules and made a dry run before the clock starts.
Memory is the peak of RssAnon in /proc/self/status (anonymous pages: no mapped files, no page cache), sampled every
5 ms, above what it was after that dry run.

Goals: at least half the speed of `cp`, and at most three times the largest tensor and 256 MB of memory.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from goals import Goal, report

import megatron_mm1.checkpoint  # noqa: F401  # before megatron-core is imported
from megatron_mm1.checkpoint.compare import compare
from megatron_mm1.checkpoint.safetensors_folder import SafetensorsFolder, write_safetensors
from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorInfo
from megatron_mm1.checkpoint.weights import open_folder
from megatron_mm1.cli import main as mm1

CONVERSIONS = ("import", "export", "reshard")
HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 2048, 5632, 16, 4, 32000
SPEED = 0.5
TENSORS, ALLOWANCE = 3, 256e6
LEAST_ROUNDS = 3
SAMPLE_SECONDS = 0.005


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time conversions against cp.")
    parser.add_argument("--gb", type=float, default=2.0, metavar="X", help="size of the checkpoint (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all conversions (%(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="disk to use (the system's for temporary files)")
    parser.add_argument("--child", nargs=2, metavar=("CONVERSION", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return convert_in_this_process(*args.child)
    if args.rounds < LEAST_ROUNDS or args.gb <= 0:
        parser.error(f"--rounds must be at least {LEAST_ROUNDS}, --gb more than 0")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size, largest = prepare(folder, size=args.gb * 1e9)
        seconds, memory = take_turns(folder, args.rounds)
    ratios = {name: [copy / own for copy, own in pairs] for name, pairs in seconds.items()}
    settings: dict[str, object] = {
        "checkpoint": f"{size / 1e9:.2f} GB of bf16, largest tensor {largest / 1e6:.0f} MB",
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
    }
    for name, pairs in seconds.items():
        copy, own = (statistics.median(times) for times in zip(*pairs, strict=True))
        settings[name] = (
            f"{own:.2f} s, cp {copy:.2f} s (medians); ratios {min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
        )
    goals = [Goal(f"{name}_speed", statistics.median(found), "x_cp", ">", SPEED) for name, found in ratios.items()]
    bound = (TENSORS * largest + ALLOWANCE) / 1e6
    goals += [Goal(f"{name}_memory", max(found) / 1e6, "MB", "<", bound) for name, found in memory.items()]
    return report(settings, goals)


def prepare(folder: Path, *, size: float) -> tuple[int, int]:
    """Write the sources and check the round trip; bytes of the checkpoint and of its largest tensor.

    Raises:
        ArithmeticError: what was exported is not what was imported.
    """
    layer = HIDDEN * (2 * HIDDEN + 2 * HIDDEN * GROUPS // HEADS + 3 * FFN)
    layers = max(1, round((size / 2 - 2 * VOCABULARY * HIDDEN) / layer))
    write_safetensors(folder / "llama", llama(layers), config=llama_config(layers))
    for conversion, name in (("import", "mm1"), ("export", "exported")):
        run(conversion, folder)
        (folder / "output").rename(folder / name)
    if next(compare(SafetensorsFolder(folder / "llama"), SafetensorsFolder(folder / "exported")), None):
        raise ArithmeticError("what was exported is not what was imported: nothing was timed")
    shutil.rmtree(folder / "exported")
    sizes = [info.num_bytes for info in open_folder(folder / "mm1").tensors.values()]
    return sum(sizes), max(sizes)


def llama(layers: int) -> Plan:
    """Random tensors under transformers' names, drawn when they are written."""
    keys = HIDDEN * GROUPS // HEADS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (keys, HIDDEN),
                "self_attn.v_proj": (keys, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (FFN, HIDDEN),
                "mlp.up_proj": (FFN, HIDDEN),
                "mlp.down_proj": (HIDDEN, FFN),
            }.items()
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return [
        PlannedTensor(name, TensorInfo(shape, torch.bfloat16), (), (Piece(shape[0], partial(drawn, shape)),))
        for name, shape in shapes.items()
    ]


def drawn(shape: tuple[int, ...]) -> torch.Tensor:
    """Of random bits below 2, so that each is a number and none is like another."""
    bits = torch.randint(-(1 << 15), 0x4000, shape, dtype=torch.int16)
    return (bits & 0xBFFF - 0x10000).view(torch.bfloat16)


def llama_config(layers: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def take_turns(folder: Path, rounds: int) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[float]]]:
    """(seconds of cp, seconds of the conversion) of each round, and bytes of memory, by conversion."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONVERSIONS}
    memory: dict[str, list[float]] = {name: [] for name in CONVERSIONS}
    for number in range(rounds):
        for name in CONVERSIONS:
            source = folder / ("llama" if name == "import" else "mm1")
            if number % 2 == 0:
                copied = time_copy(source, folder)
                own, peak = time_conversion(name, folder)
            else:
                own, peak = time_conversion(name, folder)
                copied = time_copy(source, folder)
            seconds[name].append((copied, own))
            memory[name].append(peak)
    return seconds, memory


def time_copy(source: Path, folder: Path) -> float:
    with emptied(folder / "output") as output:
        started = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", source, output], check=True)
        for path in [*output.rglob("*"), output]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return time.perf_counter() - started


def time_conversion(name: str, folder: Path) -> tuple[float, float]:
    with emptied(folder / "output"):
        return run(name, folder)


@contextmanager
def emptied(output: Path) -> Iterator[Path]:
    """Nothing of an earlier turn is left to be written while this one is timed."""
    os.sync()
    yield output
    shutil.rmtree(output)


def run(name: str, folder: Path) -> tuple[float, float]:
    """Seconds and bytes of a conversion in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(folder)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = json.loads(result.stdout.splitlines()[-1])
    return seconds, peak


def convert_in_this_process(name: str, folder_name: str) -> int:
    folder = Path(folder_name)
    arguments = {
        "import": ["--source", str(folder / "llama"), "--preset", "mm1-tiny"],
        "export": ["--checkpoint", str(folder / "mm1"), "--family", "llama"],
        "reshard": ["--checkpoint", str(folder / "mm1"), "--tensor-model-parallel-size", "4", "--pieces", "4"],
    }[name]
    with redirect_stdout(sys.stderr), open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere):
            if mm1(["convert", name, *arguments, "--dry-run"]):
                return 1
        before = anonymous_bytes()
        with peak_memory() as peaks:
            started = time.perf_counter()
            if mm1(["convert", name, *arguments, "--output", str(folder / "output")]):
                return 1
            seconds = time.perf_counter() - started
    print(json.dumps([seconds, max(peaks) - before]))
    return 0


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Samples of this process's anonymous memory while the block runs."""
    samples = [anonymous_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
