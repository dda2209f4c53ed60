"""What a run says while it runs: console lines in Megatron's form, JSON lines, TensorBoard, a progress bar. Rank 0
only.
"""

import json
import math
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_mm1.config import MM1Config
from megatron_mm1.training.weights_and_biases import WandbRun


class RunLogger:
    """Writes to `<run_dir>/log.jsonl`, `<run_dir>/tensorboard` and the terminal.

    Args:
        config: run_dir and logging are read; all of it is shown in Weights & Biases.
        iteration: steps already taken, where a resumed run's progress bar starts.
        enabled: False makes every method do nothing (ranks other than 0).
        wandb_run_id: the run in Weights & Biases to go on with.
    """

    def __init__(self, config: MM1Config, *, iteration: int, enabled: bool, wandb_run_id: str | None = None) -> None:
        self.enabled = enabled
        self._bar: tqdm | None = None
        self._tensorboard: Any = None
        self._wandb: WandbRun | None = None
        self._earlier_wandb_run_id = wandb_run_id if enabled else None
        if not enabled:
            return
        run_dir = self._run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / "log.jsonl").open("a", buffering=1)
        if config.logging.tensorboard:
            self._tensorboard = _tensorboard(run_dir, iteration)
        if config.logging.wandb_project is not None:
            self._wandb = WandbRun(config, run_id=wandb_run_id, say=self.say)
        wanted = config.logging.progress_bar
        if sys.stderr.isatty() if wanted is None else wanted:
            self._bar = tqdm(
                total=config.training.train_iters,
                initial=iteration,
                desc=config.name,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    @property
    def wandb_run_id(self) -> str | None:
        """The run that is logged to, or one that an earlier process of this run logged to; None: there is none, or this
        rank does not log (rank 0 writes a checkpoint's metadata).
        """
        return self._earlier_wandb_run_id if self._wandb is None else self._wandb.id

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, **figures: float) -> None:
        """One step done; figures are shown beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
            self._bar.update()

    def go_back(self, iteration: int) -> None:
        """The run goes on from an earlier step."""
        if self._bar is not None:
            self._bar.n = iteration
            self._bar.refresh()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _tensorboard(self._run_dir, iteration)

    def record(self, kind: str, iteration: int, figures: Mapping[str, Any]) -> None:
        """Append one JSON line and, for every finite number in it, a TensorBoard point `kind/name`; others are null."""
        if not self.enabled:
            return
        finite = {name: value if _is_finite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"kind": kind, "iteration": iteration, **finite}) + "\n")
        if self._tensorboard is not None:
            for name, value in finite.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, iteration)
        if self._wandb is not None:
            points = {f"{kind}/{name}": value for name, value in finite.items() if isinstance(value, int | float)}
            self._wandb.log({**points, "iteration": iteration})

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            if self._bar is not None:
                self._bar.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()


def _tensorboard(run_dir: Path, iteration: int) -> Any:
    """A writer for the steps after `iteration`; what an earlier one wrote of them, or of a run that starts over, is no
    longer shown.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=iteration + 1 if iteration else 0)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def console_line(figures: Mapping[str, Any], *, train_iters: int) -> str:
    """A training line: Megatron's fields under its names and in its order, so that existing log parsers work; ours
    follow.

    Args:
        figures: as the trainer records them (`Window.figures`).
        train_iters: length of the run.
    """
    fields = [
        f"iteration {figures['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {figures['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {figures['elapsed_time_per_iteration_ms']:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {figures['tflops_per_gpu']:.4f}",
        f"learning rate: {figures['learning_rate']:.6E}",
        f"global batch size: {figures['global_batch_size']:5d}",
        f"lm loss: {figures['lm_loss']:.6E}",
        f"grad norm: {figures['grad_norm']:.3f}",
        f"number of skipped iterations: {figures['skipped_iterations']:3d}",
        f"number of nan iterations: {figures['nan_iterations']:3d}",
        *(f"{name}: {value:.4f}" for name, value in figures.items() if name.startswith("loss ")),
        f"tokens/s: {figures['tokens_per_second']:.0f}",
        f"data wait (ms): {figures['data_wait_ms']:.1f}",
    ]
    return f" [{datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(fields) + " |"
