"""Tensors for tests of checkpoints: random, distinct, of every kind a checkpoint may hold."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorInfo
from megatron_mm1.config import MM1Config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.training.build import build_module
from megatron_mm1.training.checkpointing import NAMING


def tensors_of_every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "language_model.embedding.word_embeddings.weight": random(128, 8),
        "language_model.decoder.layers.1.mlp.experts.experts.linear_fc1.weight": random(4, 12, 8).bfloat16(),
        "language_model.decoder.final_norm.weight": random(8),
        "language_model.decoder.layers.1.mlp.router.expert_bias": random(4).double(),
        "connector.step": random(),
        "connector.scale": random().half(),
        "connector.conv.weight": random(6, 3, 2, 2).bfloat16(),
        "tower.positions": torch.arange(7),
        "tower.mask": torch.tensor([True, False, True]),
        "tower.none": torch.empty(0, 5),
    }


def in_pieces(state: Mapping[str, Tensor], rows: int) -> Plan:
    """A plan of these tensors in pieces of so many rows."""
    plan = []
    for name, tensor in state.items():
        parts = tensor.split(rows) if tensor.dim() and len(tensor) else [tensor]
        pieces = tuple(
            Piece(len(part) if part.dim() else 1, lambda part=part: part)  # type: ignore[misc]
            for part in parts
        )
        plan.append(PlannedTensor(name, TensorInfo(tuple(tensor.shape), tensor.dtype), (name,), pieces))
    return plan


def metadata(**fields: object) -> CheckpointMetadata:
    config = to_dict(preset("mm1-tiny-moe"))
    return CheckpointMetadata(
        **{
            "iteration": 3,
            "consumed_sequences": 24,
            "config": config,
            "tokenizer_fingerprint": "",
            "plan_fingerprint": "",
            "has_training_state": False,
            **fields,
        }
    )


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Same names, shapes and types, equal to the bit."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype), name
        assert torch.equal(tensor, theirs[name]), name


def read_all(source) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.tensors}


def save_random_model(config: MM1Config, folder: Path, *, groups) -> MM1Model:
    """A model of which no two weights are the same, saved by megatron-core itself into an empty folder."""
    model = build_module(config, backend="local", pg_collection=groups)
    generator = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    dist_checkpointing.save({"model": sharded_state(model, groups=groups)}, str(folder))
    return model


def sharded_state(model: MM1Model, *, groups) -> dict:
    """megatron-core's description of the weights; modules' extra state, which holds nothing here, left out."""
    described = model.sharded_state_dict(metadata={**NAMING, "dp_cp_group": groups.dp_cp})
    return {name: entry for name, entry in described.items() if not name.endswith("_extra_state")}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
