"""MM1Model: tower -> connector -> decoder, with image tokens injected into the decoder's input."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_mm1.config import MM1Config
from megatron_mm1.data.batch import ImageGroup, PackedBatch
from megatron_mm1.model.attention import segment_mask
from megatron_mm1.model.connectors import build_connector
from megatron_mm1.model.decoder import build_decoder, decoder_transformer_config
from megatron_mm1.model.vision import build_tower, vision_layer_spec, vision_transformer_config
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
    (Transformer Engine). The decoder's attribute is `language_model`, as in megatron-core's own multimodal models:
    the pipeline schedules take an attribute `decoder` for a transformer stack.

    Args:
        config: the whole configuration.
        backend: "transformer_engine" or "local".
        pg_collection: the process groups of this layout.
    """

    def __init__(self, config: MM1Config, *, backend: str, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(decoder_transformer_config(config, backend=backend))
        self.model_type = ModelType.encoder_or_decoder  # the schedules ask
        self.backend = backend
        self.pg_collection = pg_collection
        self.pre_process = pg_collection.pp.rank() == 0
        self.post_process = pg_collection.pp.rank() == pg_collection.pp.size() - 1
        self.share_embeddings_and_output_weights = not config.model.decoder.untie_embeddings_and_output_weights
        if self.pre_process:
            vision = config.model.vision
            self.vision_group, tower_groups = None, pg_collection
            if config.parallel.vision_parallel_mode == "data" and pg_collection.tp.size() > 1:
                self.vision_group, tower_groups = pg_collection.tp, copy.copy(pg_collection)
                tower_groups.tp = solo_group()
            self.image_size, self.tokens_per_image = vision.image_size, config.model.connector.tokens_per_image
            self.tower = build_tower(
                vision,
                transformer_config=vision_transformer_config(
                    vision, parallel=config.parallel, precision=config.training.precision
                ),
                layer_spec=vision_layer_spec(backend),
                pg_collection=tower_groups,
            )
            if self.vision_group is not None:
                mark_replicated(self._parameters_of("tower"))
            self.connector = build_connector(
                config.model.connector,
                vision_hidden_size=self.tower.hidden_size,
                hidden_size=config.model.decoder.hidden_size,
                grid=self.tower.grid(vision.image_size, vision.image_size),
            )
        self.language_model = build_decoder(
            config,
            self.config,
            backend=backend,
            pg_collection=pg_collection,
            pre_process=self.pre_process,
            post_process=self.post_process,
        )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight, which megatron-core keeps equal on the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Called by the pipeline schedule with the previous stage's hidden states."""
        self.language_model.set_input_tensor(input_tensor)

    def encode(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] pixels -> [N, tokens_per_image, hidden_size] image tokens, the same on all tensor-parallel
        ranks.
        """
        num_images = len(pixels)
        if self.vision_group is not None:
            start, stop = share_of(num_images, self.vision_group)
            pixels = pixels[start:stop]
        tokens = self.connector(self.tower(pixels), self.tower.grid(*pixels.shape[-2:]))
        return tokens if self.vision_group is None else gather_images(tokens, num_images, self.vision_group)

    def _parameters_of(self, *parts: str) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name.split(".")[0] in parts]

    def equalize_vision_weights(self) -> None:
        """Make initial tower and connector weights equal on ranks that share out images; on the device, by every
        rank.
        """
        if self.pre_process and self.vision_group is not None:
            broadcast_parameters(self._parameters_of("tower", "connector"), self.vision_group)

    def finalize_vision_gradients(self) -> None:
        """Add up what ranks that encoded different images found for tower and connector; every rank calls it once,
        after the backward passes of a step.
        """
        if self.pre_process and self.vision_group is not None:
            reduce_gradients(self._parameters_of("tower", "connector"), self.vision_group)

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
        return embeddings

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
            On the last stage the loss of each position [B, S] (float32; only where labels are not IGNORE does it mean
            anything), or with `return_logits` the logits [B, S, vocabulary] gathered over tensor-parallel ranks. On
            other stages the hidden states [T / (tensor-parallel size under sequence parallelism), 1, H].
        """
        hidden_states = self.embed(batch, image_tokens=image_tokens) if self.pre_process else None
        padding_mask = None
        if self.config.num_moe_experts:
            padding_mask = (batch.segment_ids == 0).reshape(1, -1)  # [1, T]
        if self.config.sequence_parallel:
            if hidden_states is not None:
                hidden_states = scatter_to_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
            if padding_mask is not None:
                padding_mask = padding_mask.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        local = self.backend == "local"
        output = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=segment_mask(batch.segment_ids) if local else None,
            decoder_input=hidden_states,
            labels=None if return_logits else batch.labels.reshape(1, -1),
            runtime_gather_output=return_logits or None,
            packed_seq_params=None if local else packed_seq_params(batch),
            padding_mask=padding_mask,
        )
        if not self.post_process:
            return output
        return output.view(*batch.tokens.shape, *output.shape[2:])


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """Cumulative example lengths of the flattened microbatch, as Transformer Engine takes them."""
    boundaries = batch.boundaries
    assert boundaries is not None, (
        "PackedBatch.to computes the boundaries on the host, before the batch reaches the device"
    )
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries.cu_seqlens,
        cu_seqlens_kv=boundaries.cu_seqlens,
        max_seqlen_q=boundaries.max_seqlen,
        max_seqlen_kv=boundaries.max_seqlen,
    )
