"""How long a periodic save of a training run holds training up, against one in-memory copy of the same state.

    OMP_NUM_THREADS=1 python benchmarks/save_stall.py

One process (on a GPU where there is one) has a model and its optimizer. In turns it copies the whole state, weights and
moments, into memory that is there already, and begins an asynchronous save; between two saves it waits until the
checkpoint is in place, as training does when it saves at intervals. Of the ratios of neighbours the median counts.
Nothing is gathered for the form that loads in any layout, so there is no gather to report. The first save, which makes
the memory for the copies, and the time until a checkpoint is in place are printed and have no goal.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from goals import Goal, report

import megatron_mm1.parallel  # noqa: F401  # before megatron-core is imported
from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.parallel.device import device, layer_backend
from megatron_mm1.parallel.groups import build_process_groups, initialize_process_group
from megatron_mm1.parity.harness import parity_config
from megatron_mm1.training.build import build_model, build_optimizer
from megatron_mm1.training.checkpointing import training_state
from megatron_mm1.training.saving import CheckpointSaver

GIGABYTE = 1e9
SMALL_TOWER = ["--model.vision.hidden_size", "64", "--model.vision.ffn_hidden_size", "128"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what an asynchronous save takes from training.")
    parser.add_argument("--hidden-size", type=int, default=1024, metavar="N", help="of the decoder (%(default)s)")
    parser.add_argument("--blocks", type=int, default=10, metavar="N", help="of the decoder (%(default)s)")
    parser.add_argument("--saves", type=int, default=7, metavar="N", help="that count (%(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="to write to (a temporary folder)")
    args = parser.parse_args(argv)
    if args.saves < 5:
        parser.error("--saves: 5 or more, for a median that means something")
    sizes = {"hidden_size": args.hidden_size, "ffn_hidden_size": 4 * args.hidden_size, "num_layers": args.blocks}
    decoder = [text for name, size in sizes.items() for text in (f"--model.decoder.{name}", str(size))]
    config = parity_config(["--preset", "mm1-tiny", "--tensor_model_parallel_size", "1", *decoder, *SMALL_TOWER])

    initialize_process_group(timeout_minutes=5)
    groups = build_process_groups(config.parallel, seed=1)
    model = build_model(config, backend=layer_backend(config), pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)

    def state() -> dict[str, object]:
        return training_state(model, optimizer, scheduler, pg_collection=groups)

    live = tensors(state())
    targets = [torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda) for tensor in live]
    size = sum(tensor.nbytes for tensor in live)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saver = CheckpointSaver(Path(folder), asynchronous=True, keep_last=1)
        stalls, copies, whole = [], [], []
        for number in range(args.saves + 1):
            copies.append(copy_seconds(live, targets))
            metadata = CheckpointMetadata(
                iteration=number,
                consumed_sequences=0,
                config=to_dict(config),
                tokenizer_fingerprint="",
                plan_fingerprint="",
                world_size=1,
            )
            began = time.perf_counter()
            saver.save(metadata, state())
            stalls.append(time.perf_counter() - began)
            saver.wait()
            whole.append(time.perf_counter() - began)
    ratios = [stall / copy for stall, copy in zip(stalls[1:], copies[1:], strict=True)]
    settings = {
        "state": f"{size / GIGABYTE:.2f} GB in {len(live)} tensors",
        "device": str(device()),
        "threads": torch.get_num_threads(),
        "saves": args.saves,
        "copy in memory": f"{statistics.median(copies[1:]):.3f} s (median)",
        "training held up": f"{statistics.median(stalls[1:]):.3f} s (median); the first save {stalls[0]:.3f} s",
        "until in place": f"{statistics.median(whole[1:]):.2f} s (median)",
    }
    return report(settings, [Goal("save_stall", statistics.median(ratios), "x_copy", "<", 1.5)])


def tensors(state: object) -> list[torch.Tensor]:
    """The tensors of a training state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    return [part.data for part in nested_values(state) if isinstance(part, ShardedTensor)]


def copy_seconds(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
