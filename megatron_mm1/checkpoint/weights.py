"""Weights in any format we know, under MM1's names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_mm1.checkpoint.dist_checkpoint import DistCheckpoint, is_dist_checkpoint
from megatron_mm1.checkpoint.format import METADATA, OPTIMIZER_PREFIX
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.checkpoint.safetensors_folder import SafetensorsFolder, is_safetensors_folder
from megatron_mm1.checkpoint.tensors import Plan, PlanSource, TensorSource, copied
from megatron_mm1.config import ModelConfig
from megatron_mm1.config.derived import COMPONENTS, num_patches
from megatron_mm1.errors import UserError


@dataclass(frozen=True)
class Weights:
    """What a folder holds.

    Attributes:
        model: its configuration; of parts that are not there, the `base` it was opened with.
        source: the tensors under our names, those of an optimizer included.
        checkpoint: the folder itself where it is an MM1 checkpoint.
        data_settings: fields of `DataConfig` that it states, a whole exported MM1 alone.
    """

    path: Path
    model: ModelConfig
    source: TensorSource
    checkpoint: MM1Checkpoint | None = None
    data_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        return components(self.source)

    def plan(self, *prefixes: str) -> Plan:
        """Its tensors as they are, of those whose names begin so."""
        return [copied(self.source, name) for name in self.source.tensors if name.startswith(prefixes)]


def open_weights(path: Path, *, base: ModelConfig, seq_length: int | None = None, with_images: bool = False) -> Weights:
    """An MM1 checkpoint, a folder of transformers or open_clip, or a LLaVAModel checkpoint of megatron-core.

    Args:
        base: the configuration of what is not there.
        seq_length: positions the decoder will see; None: as many as it was made for.
        with_images: take over too what the folder says of how images are prepared, and the `data_settings`.

    Raises:
        UserError: it is none of them, unsafe, damaged, or no model that can be an MM1's, or its images cannot be
            prepared here.
    """
    folder = open_folder(path)
    if isinstance(folder, MM1Checkpoint):
        return Weights(path, folder.metadata.mm1_config().model, folder, folder)
    settings: Mapping[str, Any] = {}
    if isinstance(folder, DistCheckpoint):
        from megatron_mm1.checkpoint.megatron_llava import import_megatron_llava

        model, plan = import_megatron_llava(folder, base=base)
    else:
        model, plan, settings = _import_safetensors(folder, base, seq_length, with_images=with_images)
    return Weights(path, model, PlanSource(plan), data_settings=settings)


def open_folder(path: Path) -> MM1Checkpoint | SafetensorsFolder | DistCheckpoint:
    """What is there, under its own names.

    Raises:
        UserError: there is nothing we know, or it is unsafe or damaged.
    """
    if not (path / METADATA).is_file():
        if is_safetensors_folder(path):
            return SafetensorsFolder(path)
        if is_dist_checkpoint(path):
            return DistCheckpoint(path)
    return MM1Checkpoint(path)


def _import_safetensors(
    folder: SafetensorsFolder, base: ModelConfig, seq_length: int | None, *, with_images: bool
) -> tuple[ModelConfig, Plan, Mapping[str, Any]]:
    from megatron_mm1.checkpoint.families import import_model
    from megatron_mm1.checkpoint.transformers_export import MODEL_TYPE, data_settings, import_from_transformers

    if folder.config.get("model_type") == MODEL_TYPE:
        model, plan = import_from_transformers(folder.config, folder)
        return model, plan, data_settings(folder, model) if with_images else {}
    images = folder.image_processor if with_images else None
    return *import_model(folder.config, folder, base=base, seq_length=seq_length, image_processor=images), {}


def components(source: TensorSource) -> tuple[str, ...]:
    """The parts of a model that have tensors here."""
    return tuple(
        component for component, prefix in COMPONENTS.items() if any(name.startswith(prefix) for name in source.tensors)
    )


def component_of(name: str) -> str:
    """The part of the model whose tensor, or whose tensor's optimizer state, this is; "" for none of them."""
    if name.startswith(OPTIMIZER_PREFIX):
        name = name.removeprefix(OPTIMIZER_PREFIX).partition(".")[2]
    return next((component for component, prefix in COMPONENTS.items() if name.startswith(prefix)), "")


def with_component(model: ModelConfig, other: ModelConfig, component: str) -> ModelConfig:
    """A model with one part as another has it.

    Raises:
        UserError: that part does not fit the connector, or the connector what is on its sides.
    """
    ours, theirs = _sizes(model), _sizes(other)
    touching = {
        "tower": ("vision.hidden_size", "patches"),
        "decoder": ("decoder.hidden_size",),
        "connector": tuple(ours),
    }
    faults = [
        f"{name} is {theirs[name]} where the {component} comes from and {ours[name]} where it goes"
        for name in touching[component]
        if ours[name] != theirs[name]
    ]
    if faults:
        raise UserError(f"the {component} does not fit: {'; '.join(faults)}: tower, connector and decoder touch there")
    if component == "tower":
        return replace(model, vision=other.vision)
    if component == "connector":
        return replace(model, connector=other.connector)
    return replace(model, decoder=other.decoder, moe=other.moe)


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "vision.hidden_size": model.vision.hidden_size,
        "patches": num_patches(model.vision),
        "decoder.hidden_size": model.decoder.hidden_size,
    }
