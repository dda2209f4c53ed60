"""A pipeline stage's part of a pass that continues sequences, without the padding and labels of training batches.

The layers are megatron-core's, whatever their backend; what calls them is ours. megatron-core's own caches want prompts
of one length (static) or CUDA kernels (dynamic), and on a CPU what its `TransformerLayer.forward` does between products
takes about as long as the products of a single position.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_mm1.model.cached_attention import Attention
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.model.precision import input_row_multiple, multiplying
from megatron_mm1.model.router import PADDING, TEXT


@dataclass(frozen=True)
class Pass:
    """Positions of any number of sequences that run together, flattened to [T]; the last may be padding.

    Attributes:
        tokens, positions: [T] int64, and where each stands in its sequence.
        num_positions: how many are no padding.
        attention: what they attend to.
        wanted: [n] int64, the positions whose logits are wanted.
        slots: [images, tokens_per_image] int64, the positions of each image; None where there is none.
    """

    tokens: Tensor
    positions: Tensor
    num_positions: int
    attention: Attention
    wanted: Tensor
    slots: Tensor | None = None


def make_pass(
    model: MM1Model,
    tokens: Sequence[int],
    positions: Sequence[int],
    attention: Attention,
    *,
    wanted: Sequence[int],
    slots: Sequence[Sequence[int]] = (),
) -> Pass:
    """A `Pass` on the model's device, as long as its layout wants: arguments as its attributes, without padding."""
    device = next(model.parameters()).device
    config = model.config
    multiple = input_row_multiple(config) * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    padding = [0] * (-len(tokens) % multiple)

    def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    return Pass(
        tokens=tensor([*tokens, *padding]),
        positions=tensor([*positions, *padding]),
        num_positions=len(tokens),
        attention=attention,
        wanted=tensor(wanted),
        slots=tensor(slots) if slots else None,
    )


def run_stage(model: MM1Model, run: Pass, *, received: Tensor | None, image_tokens: Tensor | None) -> Tensor:
    """One stage's part; every tensor-parallel rank calls it, and context-parallel ranks run each by itself.

    Args:
        received: what the stage before returned; None on the first.
        image_tokens: [images, tokens_per_image, H] of `run.slots`; read on the first stage.

    Returns:
        On the last stage the logits [n, vocabulary / tensor-parallel size] of the wanted positions, this rank's part of
        the vocabulary, float32; on others hidden states, of the shape `hidden_shape` says.
    """
    hidden_states = _embed(model, run, image_tokens) if model.pre_process else received
    assert hidden_states is not None
    config, kinds = model.config, _kinds(model, run)
    rotation = _rotation(model, run.positions, hidden_states.dtype)
    for layer in model.language_model.decoder.layers:
        with multiplying(config, layer=layer.layer_number - 1) if config.fp8 else nullcontext():
            if isinstance(layer.mlp, IdentityOp):
                hidden_states = hidden_states + _attend(layer, hidden_states, run.attention, rotation)
            else:
                hidden_states = hidden_states + _feed_forward(layer, hidden_states, kinds)
    return _logits(model, run, hidden_states) if model.post_process else hidden_states


def _attend(
    layer: TransformerLayer, hidden_states: Tensor, attention: Attention, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    module = layer.self_attention
    query, key, value = module.get_query_key_value_tensors(layer.input_layernorm(hidden_states))
    query, key = _rotate(torch.cat((query, key), dim=2), *rotation).split((query.shape[2], key.shape[2]), dim=2)
    output, bias = module.linear_proj(attention(module.layer_number, query, key, value))
    return output if bias is None else output + bias


def _feed_forward(layer: TransformerLayer, hidden_states: Tensor, kinds: Tensor | None) -> Tensor:
    """`kinds`: of positions, for experts."""
    normed = layer.pre_mlp_layernorm(hidden_states)
    output, bias = layer.mlp(normed, padding_mask=kinds) if layer.is_moe_layer else layer.mlp(normed)
    return output if bias is None else output + bias


def hidden_shape(model: MM1Model, run: Pass) -> tuple[int, int, int]:
    """Of what a stage hands to the next."""
    config = model.config
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return len(run.tokens) // parts, 1, config.hidden_size


def _embed(model: MM1Model, run: Pass, image_tokens: Tensor | None) -> Tensor:
    """[T, 1, H], or this rank's part under sequence parallelism."""
    embeddings = model.language_model.embedding(input_ids=run.tokens[None], position_ids=run.positions[None])
    if run.slots is not None:
        assert image_tokens is not None
        features = image_tokens.flatten(0, 1).unsqueeze(1)
        embeddings = embeddings.index_copy(0, run.slots.flatten(), features.to(embeddings.dtype))
    if model.config.sequence_parallel:
        embeddings = scatter_to_sequence_parallel_region(embeddings, group=model.pg_collection.tp)
    return embeddings


def _kinds(model: MM1Model, run: Pass) -> Tensor | None:
    """[1, T] int8, or this rank's part, of what experts are told of positions; None where there are no experts."""
    if not model.config.num_moe_experts:
        return None
    kinds = torch.full((1, len(run.tokens)), TEXT, dtype=torch.int8, device=run.tokens.device)
    kinds[:, run.num_positions :] = PADDING
    tp = model.pg_collection.tp
    return kinds.chunk(tp.size(), dim=1)[tp.rank()] if model.config.sequence_parallel else kinds


def _logits(model: MM1Model, run: Pass, hidden_states: Tensor) -> Tensor:
    hidden_states = model.language_model.decoder.final_norm(hidden_states)
    if model.config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=model.pg_collection.tp
        )
    return torch.nn.functional.linear(hidden_states[run.wanted, 0], _output_weight(model)).float()


def _rotation(model: MM1Model, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, 1, head_dim / 2] of each position's rotary angles."""
    language_model = model.language_model
    # Of every position whatever the context-parallel rank, which "packed" sequences have.
    angles = language_model.rotary_pos_emb(language_model.max_sequence_length, packed_seq=True)[positions]
    half = angles[..., : angles.shape[-1] // 2]
    return half.cos().to(dtype), half.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, 1, heads, head_dim] turned: element i with element i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _output_weight(model: MM1Model) -> Tensor:
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
        assert weight is not None
        return weight
    return model.language_model.output_layer.weight
