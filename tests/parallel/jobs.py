"""What the workers of a parallel test run; every function is called on each rank of a pool."""

import dataclasses
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import MM1Config, ParallelConfig
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.loader import train_batches
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.evaluation.in_training import live_evaluation
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training import trainer
from megatron_mm1.training.build import build_model, build_module, build_optimizer, named_parameters
from megatron_mm1.training.checkpointing import load_checkpoint, load_weights, training_state
from megatron_mm1.training.resume import check_ranks_agree, starting_point
from megatron_mm1.training.saving import save_checkpoint
from megatron_mm1.training.step import evaluate_batches, train_step


def with_parallel(config: MM1Config, **sizes: Any) -> MM1Config:
    """`config`, unchanged but for its parallel layout."""
    return dataclasses.replace(config, parallel=ParallelConfig(**sizes))


class Run:
    """Model and optimizer in one layout, for the length of a job."""

    backend = "local"

    def __init__(self, config: MM1Config) -> None:
        self.config = config
        self.groups = build_process_groups(config.parallel, seed=config.training.seed)
        self.model = build_model(config, backend=self.backend, pg_collection=self.groups)
        self.optimizer, self.scheduler = build_optimizer(config, self.model, pg_collection=self.groups)

    def load_weights(self, checkpoint: Path) -> None:
        load_weights(checkpoint, self.model, pg_collection=self.groups)
        self.optimizer.reload_model_params()

    def share(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """This rank's microbatches of a global batch."""
        return batches[self.groups.dp.rank() :: self.groups.dp.size()]

    def step(self, batches: list[PackedBatch]) -> dict[str, Any]:
        statistics = train_step(
            self.config,
            self.model,
            self.optimizer,
            self.scheduler,
            batches,
            pg_collection=self.groups,
            with_component_norms=True,
        )
        return {
            "loss": statistics.losses.loss,
            "source_losses": statistics.losses.source_losses(),
            "grad_norm": statistics.grad_norm,
            **(statistics.component_grad_norms or {}),
        }

    def corpus_batches(self, *, consumed_sequences: int = 0):
        """Endless shares of the corpus's global batches."""
        config = self.config
        batches = train_batches(
            config,
            tokenizer=open_tokenizer(config.data.tokenizer),
            dp_rank=self.groups.dp.rank(),
            dp_size=self.groups.dp.size(),
            with_pixels=self.groups.pp.rank() == 0,
            consumed_sequences=consumed_sequences,
        )
        count = config.training.global_batch_size // (config.training.micro_batch_size * self.groups.dp.size())
        while True:
            yield list(islice(batches, count))

    def save(self, folder: Path, *, iteration: int) -> Path:
        consumed = iteration * self.config.training.global_batch_size
        metadata = CheckpointMetadata(
            iteration=iteration,
            consumed_sequences=consumed,
            config=to_dict(self.config),
            tokenizer_fingerprint=open_tokenizer(self.config.data.tokenizer).fingerprint,
            plan_fingerprint="test",
            world_size=torch.distributed.get_world_size(),
        )
        return save_checkpoint(folder, metadata, self.state())

    def state(self) -> dict[str, Any]:
        return training_state(self.model, self.optimizer, self.scheduler, pg_collection=self.groups)

    def load(self, checkpoint: Path) -> tuple[str, ...]:
        return load_checkpoint(
            checkpoint, self.config, self.model, self.optimizer, self.scheduler, pg_collection=self.groups
        )

    def close(self) -> None:
        destroy_process_groups()


def save_initial(config: MM1Config, folder: Path) -> Path:
    """A checkpoint of freshly initialised weights."""
    run = Run(config)
    path = run.save(folder, iteration=0)
    run.close()
    return path


def train_on_corpus(config: MM1Config, checkpoint: Path, *, steps: int) -> list[dict[str, Any]]:
    """Figures of `steps` steps on the demo corpus from the weights in `checkpoint`."""
    run = Run(config)
    run.load_weights(checkpoint)
    batches = run.corpus_batches()
    figures = [run.step(next(batches)) for _ in range(steps)]
    run.close()
    return figures


def train_save_continue(config: MM1Config, folder: Path) -> list[float]:
    """Save after step 2; the losses of steps 3 to 5."""
    run = Run(config)
    batches = run.corpus_batches()
    for _ in range(2):
        run.step(next(batches))
    run.save(folder, iteration=2)
    losses = [run.step(next(batches))["loss"] for _ in range(3)]
    run.close()
    return losses


def resume(config: MM1Config, checkpoint: Path) -> list[float]:
    """The losses of steps 3 to 5 from a checkpoint after step 2, loaded over other weights so that gaps show."""
    run = Run(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=99)))
    run.load(checkpoint)
    batches = run.corpus_batches(consumed_sequences=2 * config.training.global_batch_size)
    losses = [run.step(next(batches))["loss"] for _ in range(3)]
    run.close()
    return losses


def train_as_users_do(config: MM1Config) -> None:
    """The trainer's own run, from its configuration to its last checkpoint."""
    tokenizer = open_tokenizer(config.data.tokenizer)
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    start = starting_point(config, tokenizer)
    check_ranks_agree(start)
    evaluation = live_evaluation(config) if config.evaluation.interval else None
    trainer.Run(config, backend="local", tokenizer=tokenizer, start=start, groups=groups).train(evaluation)
    destroy_process_groups()


def initial_weights(config: MM1Config, *, containing: str) -> dict[str, torch.Tensor]:
    """Freshly initialised parameters of this rank whose names contain a string."""
    run = Run(config)
    weights = {name: weight.detach().clone() for name, weight in named_parameters(run.model) if containing in name}
    run.close()
    return weights


def tower_after_unequal_seeds(config: MM1Config) -> float:
    """Sum of the tower's initial weights where every rank draws other numbers, as a GPU's generators do."""
    groups = build_process_groups(config.parallel, seed=config.training.seed)
    torch.manual_seed(groups.tp.rank())
    model = build_module(config, backend="local", pg_collection=groups)
    total = sum(float(weight.double().sum()) for name, weight in model.named_parameters() if "tower" in name)
    destroy_process_groups()
    return total


def evaluate_between_steps(config: MM1Config) -> tuple[list[float], list[float]]:
    """Losses of three steps, without and with an evaluation after each."""
    losses = []
    for with_evaluation in (False, True):
        run = Run(config)
        batches = run.corpus_batches()
        figures = []
        for _ in range(3):
            figures.append(run.step(next(batches))["loss"])
            if with_evaluation:
                held_out = run.share(synthetic_batches(config, "mixed"))
                evaluate_batches(config, run.model, held_out, pg_collection=run.groups)
        losses.append(figures)
        run.close()
    return losses[0], losses[1]


def set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)
