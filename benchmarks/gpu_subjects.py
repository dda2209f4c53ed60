"""What is timed: one step, the decoder alone and the tower alone, by this package and by the plain torch model."""

import math
from typing import Protocol

import torch
from gpu_peer import PeerModel
from gpu_peer_attention import WAYS, fastest
from gpu_slices import Slice, Variant, example_lengths, packed_batches
from torch import Tensor

from megatron_mm1.config.derived import head_dim
from megatron_mm1.config.validation import validate
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.parallel.device import layer_backend
from megatron_mm1.parallel.groups import build_process_groups, initialize_process_group
from megatron_mm1.training.build import build_model, build_optimizer, unwrap
from megatron_mm1.training.step import train_step


class Subject(Protocol):
    """A model with its optimizer and batches on the device.

    Attributes:
        settings: what was chosen for it, for the card.
    """

    settings: dict[str, object]

    def step(self) -> float:
        """Forward and backward over all microbatches and one update; the mean loss of a trained position."""
        ...

    def decoder(self) -> None:
        """Embedding, decoder blocks, output layer and loss on one microbatch, forward and backward."""
        ...

    def tower(self) -> None:
        """The tower on the images of one microbatch, forward and backward."""
        ...


def build_subject(piece: Slice, variant: Variant) -> Subject:
    return Peer(piece) if variant.is_peer else Ours(piece, variant)


class Ours:
    """The trainer's model, optimizer and step.

    Raises:
        UserError: the variant is not legal or cannot run here.
    """

    def __init__(self, piece: Slice, variant: Variant) -> None:
        self.config = variant.configure(piece.config)
        validate(self.config, world_size=1)
        backend = layer_backend(self.config)
        initialize_process_group(timeout_minutes=5)
        self.groups = build_process_groups(self.config.parallel, seed=self.config.training.seed)
        self.model = build_model(self.config, backend=backend, pg_collection=self.groups)
        self.optimizer, self.scheduler = build_optimizer(self.config, self.model, pg_collection=self.groups)
        self.batches = packed_batches(self.config)
        self.on_device = self.batches[0].to(torch.device("cuda"))
        self.inputs = PartInputs(self.on_device, piece)
        self.settings: dict[str, object] = {"layer_backend": backend, "recipe": variant.recipe}

    def step(self) -> float:
        result = train_step(
            self.config, self.model, self.optimizer, self.scheduler, self.batches, pg_collection=self.groups
        )
        return math.nan if result.skipped else result.losses.loss

    def decoder(self) -> None:
        losses = self.model[0](self.on_device, image_tokens=[self.inputs.image_tokens])
        losses.masked_fill(self.on_device.labels.flatten() == IGNORE, 0.0).sum().backward()

    def tower(self) -> None:
        unwrap(self.model[0]).tower(self.inputs.pixels).backward(self.inputs.tower_gradient)


class Peer:
    """The plain torch model, compiled, with fused AdamW."""

    def __init__(self, piece: Slice) -> None:
        device, model = torch.device("cuda"), piece.config.model
        lengths = example_lengths(piece.config)
        way, tried = fastest(
            lengths, heads=model.decoder.num_attention_heads, head_dim=head_dim(model.decoder), device=device
        )
        self.attention = WAYS[way](lengths, device)
        with device:
            self.model = PeerModel(model).bfloat16()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=piece.config.optimizer.lr, fused=True)
        self.model.compile_parts()
        self.batches = [batch.to(device) for batch in packed_batches(piece.config)]
        self.trained = sum(int((batch.labels != IGNORE).sum()) for batch in self.batches)
        self.inputs = PartInputs(self.batches[0], piece)
        self.settings: dict[str, object] = {"attention": way, "attention_milliseconds": tried, "compiled": True}

    def step(self) -> float:
        self.optimizer.zero_grad()
        total = torch.zeros((), device="cuda")
        for batch in self.batches:
            (group,) = batch.images
            assert group.pixels is not None
            loss = self.model(*_text(batch), group.slots.flatten(), group.pixels, self.attention) / self.trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(total)

    def decoder(self) -> None:
        batch, image_tokens = self.batches[0], self.inputs.image_tokens.flatten(0, 1)
        slots = batch.images[0].slots.flatten()
        self.model.decoder(*_text(batch), slots, image_tokens, self.attention).backward()

    def tower(self) -> None:
        self.model.tower(self.inputs.pixels).backward(self.inputs.tower_gradient)


def _text(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens.flatten(), batch.position_ids.flatten(), batch.labels.flatten()


class PartInputs:
    """What the parts get when they run alone.

    Attributes:
        pixels: [N, 3, H, W] float32.
        image_tokens: [N, tokens_per_image, H] bf16, in the place of the connector's; they take a gradient as those do.
        tower_gradient: [N, patches, C] bf16, in the place of the connector's.
    """

    def __init__(self, batch: PackedBatch, piece: Slice) -> None:
        model = piece.config.model
        (group,) = batch.images
        assert group.pixels is not None
        self.pixels = group.pixels
        patches = (group.height // model.vision.patch_size) * (group.width // model.vision.patch_size)
        like = torch.empty(0, device=batch.tokens.device, dtype=torch.bfloat16)
        self.image_tokens = like.new_empty(*group.slots.shape, model.decoder.hidden_size).normal_(std=0.02)
        self.image_tokens.requires_grad_()
        self.tower_gradient = like.new_empty(len(group.slots), patches, model.vision.hidden_size).normal_(std=1e-3)
