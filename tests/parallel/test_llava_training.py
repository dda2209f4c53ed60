"""Training against a model, a loss and an optimizer that are not ours.

transformers' LLaVA sees each example alone, unpacked and unpadded, shifts the labels itself and takes steps of torch's
AdamW. Ours sees the same examples assembled into packed batches, in one process and over several.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.config import MM1Config, OptimizerConfig
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.batch import ImageGroup, PackedBatch
from megatron_mm1.data.image_tokens import ImageTokens
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.data.source import Piece
from megatron_mm1.parity.jobs import itself, main_grad
from megatron_mm1.parity.report import FLOOR
from megatron_mm1.parity.shards import (
    complete_gradients,
    norms_of,
    relative_errors,
    shards,
    squared_errors,
    whole_tensors,
)
from megatron_mm1.training.build import unwrap
from megatron_mm1.training.checkpointing import training_state
from megatron_mm1.training.saving import save_checkpoint
from megatron_mm1.training.step import forward_backward
from tests.llava import IMAGE_ID, IMAGE_SIZE, PER_IMAGE, llava_model, load_llava, mm1_config
from tests.parallel.jobs import Run, with_parallel

VOCABULARY = 256
"""A multiple of 128: rows that padding adds to the embedding would take part in our softmax alone."""
SEQ_LENGTH, STEPS, WARMUP = 112, 10, 2
SEQUENCES = (
    ("i t12", "t1", "t9 i t14", "q6 t5"),  # an image in front; an example of one token; an untrained question; a tail
    ("t4 i i q3 i t20", "t25"),  # images side by side
    ("t3 i q7 t11 i", "t30", "t7", "t20"),  # an image at the end; text only behind it
    ("t8 i q5 i t9 i t10 t32",),  # one example from the first position to the last
)
"""Examples by sequence: `i` an image, `t12` twelve trained text tokens, `q6` six untrained ones."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2 PP2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "TP2+SP CP2 images shared distributed optimizer": (
        4,
        dict(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            context_parallel_size=2,
            vision_parallel_mode="data",
            use_distributed_optimizer=True,
        ),
    ),
}


def config_of(**parallel: Any) -> MM1Config:
    config = mm1_config(vocab_size=VOCABULARY)
    # Adam divides each gradient by its size: where it is only rounding, as for the tower's key biases, so would the
    # whole update be, but for an epsilon large beside rounding (1e-8) and small beside the gradients (1e-2).
    optimizer = OptimizerConfig(lr=2e-3, lr_warmup_iters=WARMUP, weight_decay=0.1, adam_eps=1e-5)
    training = dataclasses.replace(
        config.training, micro_batch_size=2, global_batch_size=len(SEQUENCES), train_iters=STEPS
    )
    data = dataclasses.replace(config.data, seq_length=SEQ_LENGTH, max_images_per_sequence=3)
    return with_parallel(dataclasses.replace(config, optimizer=optimizer, training=training, data=data), **parallel)


@dataclass(frozen=True)
class Example:
    """The same example as each side takes it.

    Attributes:
        input_ids, labels: [1, positions] int64 of transformers: each image at its full length, labels unshifted.
        pixels: [images, 3, H, W] float32.
        piece: ours, as stored: one token an image, pixels as bytes.
    """

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor
    piece: Piece


def make_example(parts: str, generator: torch.Generator) -> Example:
    pixels = torch.randn(parts.count("i"), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    input_ids: list[int] = []
    labels: list[int] = []
    stored: list[int] = []
    trained: list[bool] = []
    for part in parts.split():
        if part == "i":
            input_ids += [IMAGE_ID] * PER_IMAGE
            labels += [-100] * PER_IMAGE
            stored.append(IMAGE_ID)
            trained.append(False)
        else:
            kind, length = part[0], int(part[1:])
            text = torch.randint(IMAGE_ID + 1, VOCABULARY, (length,), generator=generator).tolist()
            input_ids += text
            labels += text if kind == "t" else [-100] * length
            stored += text
            trained += [kind == "t"] * length
    piece = Piece(np.array(stored), np.array(trained), tuple(image.numpy().tobytes() for image in pixels))
    return Example(torch.tensor([input_ids]), torch.tensor([labels]), pixels, piece)


def make_examples() -> list[list[Example]]:
    generator = torch.Generator().manual_seed(1)
    return [[make_example(parts, generator) for parts in sequence] for sequence in SEQUENCES]


class ReadsPixels:
    """In the place of an ImageProcessor, for images that are float32 pixels already."""

    def fill(self, group: ImageGroup, images: Sequence[EncodedImage]) -> ImageGroup:
        pixels = [torch.frombuffer(bytearray(image.data or b""), dtype=torch.float32) for image in images]
        return replace(group, pixels=torch.stack(pixels).view(-1, 3, IMAGE_SIZE, IMAGE_SIZE))


def packed_batches(config: MM1Config) -> list[PackedBatch]:
    """The microbatches, as the loader assembles them."""
    assemble = Assembler(
        seq_length=SEQ_LENGTH,
        image_tokens=ImageTokens(IMAGE_ID, PER_IMAGE),
        pad_id=0,
        image_size=IMAGE_SIZE,
        processor=ReadsPixels(),
    )
    rows = [Row([0] * len(sequence), [example.piece for example in sequence]) for sequence in make_examples()]
    size = config.training.micro_batch_size
    return [assemble(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class Reference:
    """What transformers' model did.

    Attributes:
        num_trained: tokens of the batch that have a loss.
        losses: mean of a trained token before each step.
        grad_norms: global, before clipping.
        states: by LLaVA's names "before" (weights), "gradients" (of the first step, not clipped), "after" (weights).
    """

    num_trained: int
    losses: list[float]
    grad_norms: list[float]
    states: dict[str, dict[str, Tensor]]


def train_llava(config: MM1Config) -> Reference:
    """STEPS steps of transformers' model on its own loss, an example at a time."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    model, settings = llava_model(vocab_size=VOCABULARY).train(), config.optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS, min_lr_rate=settings.min_lr_ratio
    )
    examples = [example for sequence in make_examples() for example in sequence]
    num_trained = sum(int((example.labels[:, 1:] != -100).sum()) for example in examples)
    states = {"before": copy_of(model.state_dict())}
    losses, grad_norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(0.0)
        for example in examples:
            loss = model(
                input_ids=example.input_ids,
                pixel_values=example.pixels if len(example.pixels) else None,
                labels=example.labels,
                num_items_in_batch=torch.tensor(num_trained),  # the sum is divided by it
            ).loss
            loss.backward()
            losses[-1] += loss.item()
        if step == 0:
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            states["gradients"] = copy_of({name: grad for name, grad in gradients.items() if grad is not None})
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)))
        optimizer.step()
        scheduler.step()
    states["after"] = copy_of(model.state_dict())
    return Reference(num_trained, losses, grad_norms, states)


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def save_reference(config: MM1Config, states: Path, folder: Path) -> Path:
    """In one process: LLaVA's tensors under the names that they have in every layout of ours, in `folder`.

    Returns:
        A checkpoint of the weights before the first step.
    """
    run = Run(config)
    theirs = torch.load(states)
    module = unwrap(run.model[0])
    named = {}
    for what in ("gradients", "after", "before"):  # the weights to start from stay in the model
        load_llava(module, theirs[what], config)
        named[what] = whole_tensors(shards(run.model, itself, pg_collection=run.groups))
    torch.save(named, folder / "reference.pt")
    metadata = CheckpointMetadata(
        iteration=0, consumed_sequences=0, config=to_dict(config), tokenizer_fingerprint="", plan_fingerprint=""
    )
    state = training_state(run.model, run.optimizer, run.scheduler, pg_collection=run.groups)
    checkpoint = save_checkpoint(folder, metadata, state)
    run.close()
    return checkpoint


def train_ours(config: MM1Config, checkpoint: Path) -> dict[str, Any]:
    """On each rank: a gradient, then STEPS steps, from the weights in `checkpoint`; against the reference beside it."""
    reference = torch.load(checkpoint.parent / "reference.pt")
    run = Run(config)
    run.load_weights(checkpoint)
    batches = run.share(packed_batches(config))
    first = forward_backward(config, run.model, batches, pg_collection=run.groups)
    for chunk in run.model:
        complete_gradients(chunk)
    gradients = squared_errors(shards(run.model, main_grad, pg_collection=run.groups), reference["gradients"])
    steps = [run.step(batches) for _ in range(STEPS)]
    weights = squared_errors(shards(run.model, itself, pg_collection=run.groups), reference["after"])
    run.close()
    return {
        "loss_sum": sum(first.loss_sums),
        "num_trained": sum(first.token_counts),
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "gradients": gradients,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def reference() -> Reference:
    return train_llava(config_of())


@pytest.fixture(scope="module")
def checkpoint(reference, pool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    torch.save(reference.states, folder / "states.pt")
    [path] = pool(1).run(save_reference, config_of(), folder / "states.pt", folder)
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, checkpoint, pool) -> list[dict[str, Any]]:
    """What each rank of a layout found."""
    world_size, sizes = LAYOUTS[request.param]
    return pool(world_size).run(train_ours, config_of(**sizes), checkpoint)


def largest_error(ranks, key: str, expected: dict[str, Tensor], *, sizes: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, and its name.

    Relative to the tensor of that name in `sizes`, or to FLOOR of all of them together where that is more.
    """
    norms = norms_of(sizes)
    least = FLOOR * math.hypot(*norms.values())
    scales = {name: max(norm, least) for name, norm in norms.items()}
    errors = relative_errors([rank[key] for rank in ranks], expected, scales=scales)
    return max((error, name) for name, error in errors.items())


def test_summed_loss_equals_transformers(ranks, reference):
    for rank in ranks:
        assert rank["num_trained"] == reference.num_trained
        assert rank["loss_sum"] == pytest.approx(reference.losses[0] * reference.num_trained, rel=1e-6)


def test_every_gradient_equals_transformers(ranks, checkpoint):
    expected = torch.load(checkpoint.parent / "reference.pt")["gradients"]
    assert all(norm > 0 for norm in norms_of(expected).values())
    error, name = largest_error(ranks, "gradients", expected, sizes=expected)
    assert error <= 1e-4, name


def test_ten_adamw_steps_equal_transformers(ranks, reference, checkpoint):
    for rank in ranks:
        assert rank["losses"] == pytest.approx(reference.losses, rel=1e-5)
        assert rank["grad_norms"] == pytest.approx(reference.grad_norms, rel=1e-4)
    tensors = torch.load(checkpoint.parent / "reference.pt")
    updates = {name: after - tensors["before"][name] for name, after in tensors["after"].items()}
    error, name = largest_error(ranks, "weights", tensors["after"], sizes=updates)
    assert error <= 1e-4, name
