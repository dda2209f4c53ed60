"""How far a run has come: model, optimizer, schedule and place in the data, as its checkpoints hold them."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import MM1Config
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.data.plan import TrainingData
from megatron_mm1.errors import UserError
from megatron_mm1.training.build import build_model, build_optimizer
from megatron_mm1.training.checkpointing import load_checkpoint, load_weights, training_state
from megatron_mm1.training.resume import Start


class Progress:
    """This rank's part of what a run has learned, at its beginning until something is loaded.

    Args:
        backend: of the layers, as `parallel.device.layer_backend` chose it.
        data: in whose order of training `consumed` counts.

    Attributes:
        iteration: optimizer steps taken.
        batch_sizes: sequences of each step.
        consumed: sequences of the training plan used, on all ranks together.
        missing: components that what was loaded has not, and so were drawn anew.
        has_other_data: what was loaded was trained on another plan.
        without_scales: components whose FP8 scales it has not, as `load_checkpoint` returns them.
    """

    def __init__(
        self, config: MM1Config, *, backend: str, data: TrainingData, pg_collection: ProcessGroupCollection
    ) -> None:
        self.config, self.data, self.groups = config, data, pg_collection
        self.model = build_model(config, backend=backend, pg_collection=pg_collection)
        self.optimizer, self.scheduler = build_optimizer(config, self.model, pg_collection=pg_collection)
        self.batch_sizes = BatchSizes.of(config.training)
        self.iteration = self.consumed = 0
        self.missing: tuple[str, ...] = ()
        self.has_other_data = False
        self.without_scales: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """The number of the coming global batch in the plan."""
        return self.batch_sizes.step_of(self.consumed)

    def advance(self) -> None:
        """The coming global batch is over."""
        self.consumed += self.batch_sizes.at(self.global_batch)
        self.iteration += 1

    def load(self, start: Start) -> None:
        """Go on from a checkpoint, or begin with its weights.

        Raises:
            UserError: it does not fit.
        """
        if start.weights_only:
            self.missing = load_weights(start.checkpoint, self.model, pg_collection=self.groups)
            self.optimizer.reload_model_params()
            return
        same_data = self.data.plan.fingerprint(start.metadata.consumed_sequences) == start.metadata.plan_fingerprint
        if not same_data and not self.config.checkpoint.accept_other_data:
            raise UserError(
                f"{start.checkpoint} was trained on another data plan (sources, weights, packing or data.seed differ): "
                "restore data.* as in its config.yaml, go on all the same from the same number of sequences with "
                "--checkpoint.accept_other_data true, or start anew from its weights with --checkpoint.finetune true"
            )
        self.has_other_data = not same_data
        self.without_scales = load_checkpoint(
            start.checkpoint, self.config, self.model, self.optimizer, self.scheduler, pg_collection=self.groups
        )
        self.iteration, self.consumed = start.metadata.iteration, start.metadata.consumed_sequences

    def state(self) -> dict[str, Any]:
        """This rank's part of a checkpoint, which refers to the live tensors."""
        return training_state(self.model, self.optimizer, self.scheduler, pg_collection=self.groups)

    def metadata(
        self, *, tokenizer_fingerprint: str, wandb_run_id: str | None, grad_norms: tuple[float, ...]
    ) -> CheckpointMetadata:
        """What a checkpoint of this moment is."""
        return CheckpointMetadata(
            iteration=self.iteration,
            consumed_sequences=self.consumed,
            config=to_dict(self.config),
            tokenizer_fingerprint=tokenizer_fingerprint,
            plan_fingerprint=self.data.plan.fingerprint(self.consumed),
            wandb_run_id=wandb_run_id,
            world_size=torch.distributed.get_world_size(),
            grad_norms=grad_norms,
        )
