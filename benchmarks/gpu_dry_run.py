"""`benchmarks/gpu.py --dry-run`: every slice and variant checked on torch's meta device, which has shapes and no data.

The product's model and the plain torch one are built, and with fewer blocks run forward and backward. Their parameters
must be as many as planning/parameters.py says, and the FLOPs that torch counts in the forward pass as many as
planning/flops.py says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed._tools.fake_collectives  # collectives of meta tensors do nothing
from gpu_peer import PeerModel
from gpu_peer_attention import varlen
from gpu_results import table
from gpu_slices import MEMORY_LIMIT, Slice, Variant, example_lengths, jobs, packed_batches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm1.config import MM1Config, ParallelConfig
from megatron_mm1.config.derived import num_patches, row_multiple
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.model.router import ExpertsLayer
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups, initialize_process_group
from megatron_mm1.planning.flops import decoder_flops, vision_flops
from megatron_mm1.planning.memory import GIB
from megatron_mm1.planning.parameters import count_parameters

META = torch.device("meta")
FLOPS_TOLERANCE = 1e-3
"""Share: the router's tally of modalities is a product, too, and no model FLOP."""


def dry_run(slices: Sequence[Slice], variants: Sequence[Variant]) -> int:
    """Print the table without its figures and what is wrong; the exit code: 0 only if nothing is."""
    initialize_process_group(timeout_minutes=1)
    groups = build_process_groups(ParallelConfig(), seed=1)
    problems = [problem for piece in slices for problem in check(piece, variants, pg_collection=groups)]
    destroy_process_groups()
    torch.distributed.destroy_process_group()
    print(table([(piece, variant, {}) for piece, variant in jobs(slices, variants)]))
    print("\n" + ("\n".join(f"wrong: {problem}" for problem in problems) or "every slice and variant can be built"))
    return 1 if problems else 0


def check(piece: Slice, variants: Sequence[Variant], *, pg_collection: ProcessGroupCollection) -> list[str]:
    """What is wrong with a slice and its variants, each with its numbers."""
    problems = [problem for variant in variants for problem in _check_variant(piece, variant)]
    checks = [_check_ours(piece, pg_collection)] if any(not variant.is_peer for variant in variants) else []
    checks += [_check_peer(piece)] if any(variant.is_peer for variant in variants) else []
    try:
        problems += [problem for found in checks for problem in found]
    except (UserError, RuntimeError) as error:  # shapes that do not go together
        problems.append(f"{type(error).__name__}: {error}")
    return [f"{piece.preset}: {problem}" for problem in problems]


def _check_variant(piece: Slice, variant: Variant) -> Iterator[str]:
    """The configuration, the memory it is expected to take, and whether FP8 products can take its sequences."""
    try:
        validate(variant.configure(piece.config), world_size=1)
    except ConfigError as error:
        yield f"{variant.name}: {error}"
    memory = piece.memory(variant).total
    if memory > MEMORY_LIMIT:
        yield f"{variant.name}: needs {memory / GIB:.1f} GiB, which is more than {MEMORY_LIMIT / GIB:.1f}"
    positions, multiple = piece.config.data.seq_length, row_multiple(variant.recipe)
    if positions % multiple:
        yield f"{variant.name}: {positions} positions are no multiple of {multiple}, which {variant.recipe} takes"


def _check_ours(piece: Slice, pg_collection: ProcessGroupCollection) -> Iterator[str]:
    model = _meta_model(piece.config, pg_collection)
    yield from _check_parameters(model, piece)
    for name, parameter in model.named_parameters():
        is_product = parameter.dim() == 2 and ".layers." in name and ".router." not in name
        if is_product and any(size % 16 for size in parameter.shape):
            yield f"{name} is {tuple(parameter.shape)}: FP8 products take multiples of 16"
    piece = shallow(piece)
    model, length = _meta_model(piece.config, pg_collection), piece.config.data.seq_length
    batch = packed_batches(piece.config)[0].to(META)
    with META, FlopCounterMode(display=False) as counter:
        losses = model(batch)
    if losses.shape != (length,) or losses.dtype != torch.float32:
        yield f"losses are {losses.dtype} {tuple(losses.shape)}: expected float32 ({length},)"
    # The local backend's attention computes what the mask hides too: twice the segment length is the same work.
    yield from _check_flops(counter, piece, segment_length=2 * length)
    yield from _check_gradients(model, losses.sum())


def _check_peer(piece: Slice) -> Iterator[str]:
    for problem in (*_check_parameters(_meta_peer(piece.config), piece), *_check_peer_run(shallow(piece))):
        yield f"plain torch: {problem}"


def _check_peer_run(piece: Slice) -> Iterator[str]:
    model = _meta_peer(piece.config)
    with META:
        attention = varlen(example_lengths(piece.config), META)
    batch = packed_batches(piece.config)[0].to(META)
    (group,) = batch.images
    text = (tensor.flatten() for tensor in (batch.tokens, batch.position_ids, batch.labels))
    formulas = {torch.ops.aten._grouped_mm: _grouped_product_flops}
    with META, FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        loss = model(*text, group.slots.flatten(), group.pixels, attention)
    yield from _check_flops(counter, piece, segment_length=0)  # torch's counter does not know this attention
    yield from _check_gradients(model, loss)


def shallow(piece: Slice) -> Slice:
    """The slice with one microbatch, two blocks of the tower and one period of the decoder's: what is deeper repeats
    their shapes.
    """
    model, training = piece.config.model, replace(piece.config.training, global_batch_size=1)
    blocks = 2 if model.moe is None else model.moe.moe_layer_freq
    vision = replace(model.vision, num_layers=1 - model.vision.feature_layer)
    model = replace(model, decoder=replace(model.decoder, num_layers=blocks), vision=vision)
    return replace(piece, config=replace(piece.config, model=model, training=training))


def _check_parameters(model: torch.nn.Module, piece: Slice) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expected = count_parameters(piece.config.model).total
    if parameters != expected:
        yield f"{parameters:,} parameters are built, and planning counts {expected:,}"


def _check_gradients(model: torch.nn.Module, loss: Tensor) -> Iterator[str]:
    with META:
        loss.backward()
    if without := [name for name, parameter in model.named_parameters() if parameter.grad is None]:
        yield f"no gradient reaches {', '.join(without)}"


def _check_flops(counter: FlopCounterMode, piece: Slice, *, segment_length: float) -> Iterator[str]:
    """Forward FLOPs of one microbatch, times three for the backward pass."""
    model, vision = piece.config.model, piece.config.model.vision
    # Pixels have no gradient: planning counts the patch embedding twice, not three times.
    patch_embedding = 6 * num_patches(vision) * vision.patch_size**2 * vision.hidden_size
    images = piece.config.data.max_images_per_sequence
    expected = decoder_flops(model, seq_length=piece.config.data.seq_length, segment_length=segment_length)
    expected += images * (vision_flops(model) + patch_embedding)
    counted = 3 * counter.get_total_flops()
    if abs(counted - expected) > FLOPS_TOLERANCE * expected:
        yield f"torch counts {counted / 1e12:.4f} TFLOP, and planning {expected / 1e12:.4f}"


def _meta_peer(config: MM1Config) -> PeerModel:
    with META:
        return PeerModel(config.model).bfloat16()


def _meta_model(config: MM1Config, pg_collection: ProcessGroupCollection) -> MM1Model:
    """The model on the meta device, and what it would otherwise compute on another one."""
    with META:
        model = MM1Model(config, backend="local", pg_collection=pg_collection)
    model = model.bfloat16()
    # megatron-core computes rotary angles where the process computes.
    model.language_model.rotary_pos_emb.register_forward_hook(lambda module, inputs, angles: angles.to(META))
    for layer in model.modules():
        if isinstance(layer, ExpertsLayer):
            layer.token_dispatcher = EvenDispatcher(layer.config, pg_collection=pg_collection)
    return model


class EvenDispatcher(MoETokenDispatcher):
    """Gives every expert as many tokens as every other: which ones the router chose is data, and meta tensors have
    none.
    """

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states: [s, b, H]; probs: [tokens, experts]. Returns a row and a weight per token and choice."""
        self.hidden_shape, topk = hidden_states.shape, self.config.moe_router_topk
        return hidden_states.flatten(0, 1).repeat(topk, 1), probs.topk(topk, dim=1).values.T.flatten()

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, experts = len(hidden_states), self.config.num_moe_experts
        ends = torch.arange(experts + 1, device="cpu") * rows // experts
        return hidden_states, ends.diff(), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.unflatten(0, (self.config.moe_router_topk, -1)).sum(dim=0).view(self.hidden_shape)


def _grouped_product_flops(
    rows: torch.Size, weights: torch.Size, *args: object, out_shape: torch.Size, **kwargs: object
) -> int:
    """2 m k n of rows [m, k] with weights [experts, k, n], each row with those of its expert."""
    return 2 * rows[0] * weights[1] * weights[2]
