"""MM1Model: tower -> connector -> decoder, with image tokens injected into the decoder's input."""

import copy
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import COMPONENTS, frozen_weights, lora_targets
from megatron_mm1.data.batch import ImageGroup, PackedBatch
from megatron_mm1.model.attention import segment_mask
from megatron_mm1.model.connectors import Linear, build_connector
from megatron_mm1.model.decoder import build_decoder, decoder_transformer_config
from megatron_mm1.model.lora import Adapters, draw_adapters, is_adapter, with_gradient
from megatron_mm1.model.precision import input_row_multiple, multiplying, with_recipe
from megatron_mm1.model.router import IMAGE, PADDING, TEXT, Router
from megatron_mm1.model.vision import build_tower, vision_layer_spec, vision_transformer_config
from megatron_mm1.parallel.context import ChunkBoundaries, local_chunks, local_positions
from megatron_mm1.parallel.groups import solo_group
from megatron_mm1.parallel.vision_work import (
    broadcast_parameters,
    gather_images,
    mark_replicated,
    reduce_gradients,
    share_of,
)


class MM1Model(MegatronModule):
    """One pipeline stage of an MM1: tower, connector and embedding on the first, the output layer on the last.

    The decoder sees a microbatch of B packed sequences of S positions as one of T = B * S: hidden states are [T, 1,
    H], and attention is kept within examples by the mask of `segment_mask` (local backend) or by cumulative lengths
    (Transformer Engine). Under context parallelism each rank has T / C of the positions from the first block on. The
    decoder's attribute is `language_model`, as in megatron-core's own multimodal models: the pipeline schedules take
    an attribute `decoder` for a transformer stack.

    Args:
        config: the whole configuration.
        backend: "transformer_engine" or "local".
        pg_collection: the process groups of this layout.
        vp_stage: which of this rank's virtual stages; None where there is one.
    """

    def __init__(
        self,
        config: MM1Config,
        *,
        backend: str,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(decoder_transformer_config(config, backend=backend))
        self.model_type = ModelType.encoder_or_decoder  # the schedules ask
        self.backend = backend
        self.fp8 = config.fp8
        self.pg_collection = pg_collection
        self.vp_stage = vp_stage
        pp, last_virtual = pg_collection.pp, config.parallel.virtual_pipeline_model_parallel_size - 1
        self.pre_process = pp.rank() == 0 and vp_stage in (None, 0)
        self.post_process = pp.rank() == pp.size() - 1 and vp_stage in (None, last_virtual)
        self.share_embeddings_and_output_weights = not config.model.decoder.untie_embeddings_and_output_weights
        if self.pre_process:
            self._build_vision(config)
        self.language_model = build_decoder(
            config,
            self.config,
            backend=backend,
            pg_collection=pg_collection,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=vp_stage,
        )
        draw_adapters(self, seed=config.training.seed)
        self._freeze(frozen_weights(config))
        self.input_needs_gradient = bool(lora_targets(config.model.lora, "decoder"))

    def _build_vision(self, config: MM1Config) -> None:
        vision, groups = config.model.vision, copy.copy(self.pg_collection)
        groups.cp = solo_group() if groups.cp.size() > 1 else groups.cp  # an image's patches are never split
        self.vision_group = None
        if config.parallel.vision_parallel_mode == "data" and self.pg_collection.tp_cp.size() > 1:
            self.vision_group, groups.tp = self.pg_collection.tp_cp, solo_group()
        self.image_size, self.tokens_per_image = vision.image_size, config.model.connector.tokens_per_image
        self.tower = build_tower(
            vision,
            transformer_config=vision_transformer_config(
                vision,
                parallel=config.parallel,
                precision=config.training.precision,
                recompute=config.training.vision_recompute,
                fp8_recipe=config.fp8.tower_recipe,
            ),
            layer_spec=vision_layer_spec(
                self.backend,
                attention_kernel=config.training.attention_kernel,
                adapters=Adapters.of(config.model.lora, "tower"),
            ),
            pg_collection=groups,
        )
        if self.vision_group is not None:
            mark_replicated(self._parameters_of("tower"))
        self.connector_config = with_recipe(self.config, config.fp8.connector_recipe)
        self.connector = build_connector(
            config.model.connector,
            vision_hidden_size=self.tower.hidden_size,
            hidden_size=config.model.decoder.hidden_size,
            grid=self.tower.grid(vision.image_size, vision.image_size),
            linear=self._connector_linear(),
        )

    def _connector_linear(self) -> Linear:
        if self.backend == "local":
            return torch.nn.Linear
        from megatron_mm1.model.te_linear import PaddedLinear

        return partial(PaddedLinear, row_multiple=input_row_multiple(self.connector_config))

    def _freeze(self, components: Collection[str]) -> None:
        """Take components, but for their adapters, out of training, gradient buffers and optimizer."""
        prefixes = tuple(COMPONENTS[component] for component in components)
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes) and not is_adapter(name):
                parameter.requires_grad_(False)
        for module in self.language_model.modules():
            if isinstance(module, Router):
                module.frozen_expert_bias = "decoder" in components

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight, which megatron-core keeps equal on the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Called by the pipeline schedule with the previous stage's hidden states."""
        self.language_model.set_input_tensor(input_tensor)

    def encode(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] pixels -> [N, tokens_per_image, hidden_size] image tokens, the same on all tensor- and
        context-parallel ranks.
        """
        num_images = len(pixels)
        if self.vision_group is not None:
            start, stop = share_of(num_images, self.vision_group)
            pixels = pixels[start:stop]
        features = self.tower(pixels)
        with nullcontext() if self.backend == "local" else multiplying(self.connector_config):
            tokens = self.connector(features, self.tower.grid(*pixels.shape[-2:]))
        if self.vision_group is None:
            return tokens
        return gather_images(tokens, num_images, self.vision_group, context_group=self.pg_collection.cp)

    def _parameters_of(self, *parts: str) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name.split(".")[0] in parts]

    def equalize_vision_weights(self) -> None:
        """Make initial tower and connector weights equal on tensor-parallel ranks that share out images (the others
        are replicas, which data parallelism equalises); on the device, by every rank.
        """
        if self.pre_process and self.vision_group is not None:
            broadcast_parameters(self._parameters_of("tower", "connector"), self.pg_collection.tp)

    def finalize_vision_gradients(self) -> None:
        """Add up what tensor-parallel ranks that encoded different images found for tower and connector; every rank
        calls it once, after the backward passes of a step and data parallelism's reduction, which covers context-
        parallel ranks.
        """
        if self.pre_process and self.vision_group is not None:
            reduce_gradients(self._parameters_of("tower", "connector"), self.pg_collection.tp)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """This rank's tensors for a distributed checkpoint; `metadata` has `dp_cp_group`, the replicas of this rank."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            replicas = dict(metadata or {})
            if name == "tower" and self.vision_group is not None:
                replicas["dp_cp_group"] = self.pg_collection.tp_dp_cp  # whole on tensor-parallel ranks too
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, replicas, tp_group=self.pg_collection.tp
            )
        return state

    def embed(self, batch: PackedBatch, *, image_tokens: Sequence[Tensor] | None = None) -> Tensor:
        """Text embeddings with image tokens in their slots: [T, 1, H].

        `image_tokens` are what `encode` made of each group of images earlier; pixels are then not read.
        """
        tokens = batch.tokens.reshape(1, -1)
        embeddings = self.language_model.embedding(input_ids=tokens, position_ids=batch.position_ids.reshape(1, -1))
        groups = batch.images
        if image_tokens is None:
            groups = groups or (self._no_images(tokens.device),)
            image_tokens = [self._encode_group(group) for group in groups]
        for group, features in zip(groups, image_tokens, strict=True):
            features = features.flatten(0, 1).unsqueeze(1)
            embeddings = embeddings.index_copy(0, group.slots.flatten(), features.to(embeddings.dtype))
        return with_gradient(embeddings) if self.input_needs_gradient else embeddings

    def _encode_group(self, group: ImageGroup) -> Tensor:
        assert group.pixels is not None, "the first pipeline stage needs the pixels of every image"
        return self.encode(group.pixels)

    def _no_images(self, device: torch.device) -> ImageGroup:
        """An empty group. A microbatch without images takes the same path, so that gradients (zeros) and collectives
        are the same on every rank.
        """
        size, tokens = self.image_size, self.tokens_per_image
        slots = torch.empty(0, tokens, dtype=torch.int64, device=device)
        return ImageGroup(slots=slots, height=size, width=size, pixels=torch.empty(0, 3, size, size, device=device))

    def forward(
        self, batch: PackedBatch, *, image_tokens: Sequence[Tensor] | None = None, return_logits: bool = False
    ) -> Tensor:
        """Run this stage.

        Args:
            batch: one microbatch, on this rank's device; pixels are read on the first stage, labels on the last.
            image_tokens: of each image group, where they are known already: see `embed`.
            return_logits: what the last stage returns.

        Returns:
            On the last stage the loss of each of this rank's positions [T / C] (float32; only where labels are not
            IGNORE does it mean anything), or with `return_logits` the logits [B, S, vocabulary] gathered over
            tensor-parallel ranks (not under context parallelism). On other stages the hidden states [T / C / (tensor-
            parallel size under sequence parallelism), 1, H].
        """
        tp, cp = self.pg_collection.tp, self.pg_collection.cp
        assert not (return_logits and cp.size() > 1), "logits are for inference, which runs without context parallelism"
        hidden_states = None
        if self.pre_process:
            hidden_states = local_positions(self.embed(batch, image_tokens=image_tokens), cp)
        kinds = None
        if self.config.num_moe_experts:
            kinds = local_positions(position_kinds(batch), cp)[None]  # [1, T / C]
        if self.config.sequence_parallel:
            if hidden_states is not None:
                hidden_states = scatter_to_sequence_parallel_region(hidden_states, group=tp)
            if kinds is not None:
                kinds = kinds.chunk(tp.size(), dim=1)[tp.rank()]
        local = self.backend == "local"
        output = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=segment_mask(batch.segment_ids, cp) if local else None,
            decoder_input=hidden_states,
            labels=None if return_logits else local_positions(batch.labels.flatten(), cp)[None],
            runtime_gather_output=return_logits or None,
            packed_seq_params=None if local else packed_seq_params(batch, cp),
            padding_mask=kinds,
        )
        if not self.post_process:
            return output
        return output.view(*batch.tokens.shape, -1) if return_logits else output.flatten()


def position_kinds(batch: PackedBatch) -> Tensor:
    """[T] int8 TEXT, IMAGE or PADDING of each position of the flattened microbatch."""
    kinds = torch.where(batch.segment_ids.flatten() == 0, PADDING, TEXT).to(torch.int8)
    for group in batch.images:
        kinds.index_fill_(0, group.slots.flatten(), IMAGE)
    return kinds


def packed_seq_params(batch: PackedBatch, context_group: ProcessGroup) -> PackedSeqParams:
    """Boundaries of the examples of the flattened microbatch, as Transformer Engine's attention takes them."""
    boundaries = batch.boundaries
    assert boundaries is not None, (
        "PackedBatch.to computes the boundaries on the host, before the batch reaches the device"
    )
    if context_group.size() > 1:
        from megatron_mm1.model.packed_attention import ContextParallelParams

        positions, device = batch.tokens.numel(), batch.tokens.device
        chunks = tuple(
            ChunkBoundaries.of(boundaries.on_host, start, stop, device=device)
            for start, stop in local_chunks(positions, context_group)
        )
        return ContextParallelParams(max_seqlen_q=positions, max_seqlen_kv=positions, chunks=chunks)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries.cu_seqlens,
        cu_seqlens_kv=boundaries.cu_seqlens,
        max_seqlen_q=boundaries.max_seqlen,
        max_seqlen_kv=boundaries.max_seqlen,
    )
