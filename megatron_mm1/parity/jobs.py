"""What the worker processes run."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.parity.shards import Shard, Squares, complete_gradients, shards, squared_errors, whole_tensors
from megatron_mm1.training.build import Model, build_model, build_optimizer
from megatron_mm1.training.checkpointing import load_weights, training_state
from megatron_mm1.training.saving import save_checkpoint
from megatron_mm1.training.step import forward_backward, update_weights

LEARNING_RATE = 10.0
"""Of a plain gradient step, whose size `optimizer.clip_grad` then sets."""

INITIAL = "initial"
"""In place of a kind of batch: before any."""

_EPSILON = 1e8
"""Without momentum and with this beside the root of the squared gradient, Adam is gradient descent to 1e-8 (and the
distributed optimizer takes nothing but Adam, whose own first step would be the gradient's sign)."""


@dataclass(frozen=True)
class Outcome:
    """What one rank found for one kind of batch.

    Attributes:
        losses: before each gradient step.
        grad_norm: global, before clipping, of the first.
        gradients, weights: squared errors of this rank's shards against the reference's: of the first step's gradient,
            and of the weights after it.
    """

    losses: tuple[float, ...]
    grad_norm: float
    gradients: Squares
    weights: Squares


class Trial:
    """The model in one layout with gradient descent as its optimizer, for the length of a job."""

    def __init__(self, config: MM1Config, *, backend: str) -> None:
        descent = replace(config.optimizer, optimizer="adamw", adam_beta1=0.0, adam_eps=_EPSILON)
        config = self.config = replace(config, optimizer=descent)
        self.groups: ProcessGroupCollection = build_process_groups(config.parallel, seed=config.training.seed)
        self.model: Model = build_model(config, backend=backend, pg_collection=self.groups)
        self.optimizer: MegatronOptimizer
        self.optimizer, self.scheduler = build_optimizer(config, self.model, pg_collection=self.groups)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = LEARNING_RATE * _EPSILON, 0.0
        self.initial: list[list[Tensor]] = []

    def load(self, checkpoint: Path) -> None:
        load_weights(checkpoint, self.model, pg_collection=self.groups)
        self.keep_initial()

    def keep_initial(self) -> None:
        self.initial = [[weight.detach().clone() for weight in chunk.parameters()] for chunk in self.model]

    @torch.no_grad()
    def restore_initial(self) -> None:
        for chunk, weights in zip(self.model, self.initial, strict=True):
            for parameter, weight in zip(chunk.parameters(), weights, strict=True):
                parameter.copy_(weight)
            for module in chunk.modules():
                bias = getattr(module, "expert_bias", None)
                if bias is not None:
                    bias.zero_()
        self.optimizer.reload_model_params()

    def backward(self, batches: Sequence[PackedBatch]) -> float:
        """The loss of a global batch, from this rank's microbatches of it; leaves its gradient in `main_grad`."""
        self.optimizer.zero_grad()
        losses = forward_backward(self.config, self.model, batches, pg_collection=self.groups)
        return losses.loss

    def update(self) -> float:
        """One clipped step, as training does it; the gradient norm before clipping."""
        return update_weights(self.config, self.optimizer)[0]

    def shards(self, what: str) -> Iterator[Shard]:
        """This rank's shards of the trained parameters' "gradients" or "weights"."""
        return shards(self.model, main_grad if what == "gradients" else itself, pg_collection=self.groups)

    def close(self) -> None:
        destroy_process_groups()
        gc.collect()


def main_grad(parameter: torch.nn.Parameter) -> Tensor:
    return parameter.main_grad  # type: ignore[attr-defined]


def itself(parameter: torch.nn.Parameter) -> Tensor:
    return parameter


def save_initial(config: MM1Config, folder: Path, *, backend: str) -> Path:
    """In one process: a checkpoint of weights of which none is 0 or 1, norms and biases included."""
    trial = Trial(config, backend=backend)
    generator = torch.Generator().manual_seed(config.training.seed)
    with torch.no_grad():
        for chunk in trial.model:
            for name, parameter in chunk.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                # Routers choose by a wide margin, so that rounding does not decide.
                parameter.add_(noise, alpha=0.5 if "router" in name else 0.05)
    metadata = CheckpointMetadata(
        iteration=0, consumed_sequences=0, config=to_dict(config), tokenizer_fingerprint="", plan_fingerprint=""
    )
    state = training_state(trial.model, trial.optimizer, trial.scheduler, pg_collection=trial.groups)
    path = save_checkpoint(folder, metadata, state)
    trial.close()
    return path


Batches = Callable[[MM1Config, str, ProcessGroupCollection], Sequence[PackedBatch]]
"""Makes this rank's microbatches of a global batch of some kind."""


def synthetic_share(config: MM1Config, kind: str, pg_collection: ProcessGroupCollection) -> list[PackedBatch]:
    """This rank's microbatches of `synthetic_batches`."""
    return synthetic_batches(config, kind)[pg_collection.dp.rank() :: pg_collection.dp.size()]


def reference_tensors(folder: Path, kind: str, what: str) -> dict[str, Tensor]:
    """Whole tensors of one process for a kind of batch: its "gradients", and "weights" after the first step; of kind
    INITIAL, the "weights" before."""
    tensors: dict[str, Tensor] = torch.load(_reference_file(folder, kind, what), mmap=True)
    return tensors


def _reference_file(folder: Path, kind: str, what: str) -> Path:
    return folder / f"{kind} {what}.pt"


def _record(trial: Trial, kind: str, what: str, *, folder: Path) -> Squares:
    torch.save(whole_tensors(trial.shards(what)), _reference_file(folder, kind, what))
    return {}


def _compare(trial: Trial, kind: str, what: str, *, folder: Path) -> Squares:
    return squared_errors(trial.shards(what), reference_tensors(folder, kind, what))


def _run(
    observe: Callable[..., Squares],
    config: MM1Config,
    checkpoint: Path,
    *,
    backend: str,
    kinds: Sequence[str],
    steps: int,
    folder: Path,
    batches: Batches = synthetic_share,
) -> dict[str, Outcome]:
    """Each kind of batch from the same weights; `observe` sees the first step's gradients, and the weights after it."""
    trial = Trial(config, backend=backend)
    trial.load(checkpoint)
    loaded = observe(trial, INITIAL, "weights", folder=folder)
    if wrong := [name for name, errors in loaded.items() if any(errors.values())]:
        raise RuntimeError(f"these weights are not the checkpoint's: {', '.join(wrong)}")
    outcomes = {}
    for kind in kinds:
        trial.restore_initial()
        share = batches(config, kind, trial.groups)
        losses = [trial.backward(share)]
        for chunk in trial.model:
            complete_gradients(chunk)
        gradients = observe(trial, kind, "gradients", folder=folder)
        grad_norm = trial.update()
        weights = observe(trial, kind, "weights", folder=folder)
        for _ in range(steps - 1):
            losses.append(trial.backward(share))
            trial.update()
        outcomes[kind] = Outcome(tuple(losses), grad_norm, gradients, weights)
    trial.close()
    return outcomes


run_reference = partial(_run, _record)
"""In one process: what each kind of batch gives; the tensors go to `folder` (see `reference_tensors`)."""

run_layout = partial(_run, _compare)
"""On every rank of a layout: each kind of batch against the reference in `folder`."""
