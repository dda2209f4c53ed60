"""A model for images of another resolution: learned positions of patches, resampled for the new grid."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from megatron_mm1.checkpoint.model_check import model_problems
from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorInfo, TensorSource, copied
from megatron_mm1.config import ModelConfig
from megatron_mm1.config.derived import COMPONENTS, num_patches
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.positions import interpolate_positions

_TOWER, _CONNECTOR = (f"{COMPONENTS[part]}position_embeddings" for part in ("tower", "connector"))


def resize(model: ModelConfig, image_size: int, source: TensorSource) -> tuple[ModelConfig, Plan]:
    """The position embeddings of tower and connector for images of another size; everything else stays.

    The new model computes at once what the old one does with such images, which resamples them in every pass; then
    it can be trained on the new grid's positions themselves, as the paper fine-tunes [P]. The connector `mlp`, which
    makes a token of each patch, gets another number of tokens.

    Only weights are taken over: the optimizer's state of the embeddings belongs to the old grid.

    Args:
        model: of `source`.
        image_size: px, a multiple of the tower's patch size.
        source: tensors by their names in a checkpoint; others than the model's are left. Parts may be missing.

    Returns:
        The new model and its tensors.

    Raises:
        ConfigError: there can be no such model.
        UserError: the tower is not ours, so that it is not known what its positions are, or an embedding has another
            shape than the configuration says.
    """
    if model.vision.tower != "vit":
        raise UserError(f"only the built-in tower's positions can be resampled, and this one is {model.vision.tower}")
    vision = replace(model.vision, image_size=image_size)
    resized = replace(model, vision=vision)
    if model.connector.connector == "mlp":
        resized = replace(resized, connector=replace(model.connector, tokens_per_image=num_patches(vision)))
    if problems := model_problems(resized):
        raise ConfigError(problems)
    prefixes = {_TOWER: int(vision.class_token)}
    if model.connector.connector == "c_abstractor":
        prefixes[_CONNECTOR] = 0
    old, new = (size // vision.patch_size for size in (model.vision.image_size, image_size))
    plan = [
        _resampled(source, name, old=old, new=new, prefix=prefixes[name]) if name in prefixes else copied(source, name)
        for name in source.tensors
        if name.startswith(tuple(COMPONENTS.values()))
    ]
    return resized, plan


def _resampled(source: TensorSource, name: str, *, old: int, new: int, prefix: int) -> PlannedTensor:
    """Position embeddings of `old` x `old` patches behind `prefix` others, for `new` x `new` ones."""
    info = source.tensors[name]
    width = info.shape[-1]
    if info.shape != (prefix + old * old, width):
        raise UserError(f"{name} has shape {info.shape}, the configuration makes it {(prefix + old * old, width)}")
    rows = prefix + new * new
    read = partial(_read, source, name, old=old, new=new, prefix=prefix)
    return PlannedTensor(name, TensorInfo((rows, width), info.dtype), (name,), (Piece(rows, read),))


def _read(source: TensorSource, name: str, *, old: int, new: int, prefix: int) -> Tensor:
    return interpolate_positions(
        source.read(name), from_grid=(old, old), to_grid=(new, new), prefix_tokens=prefix
    ).contiguous()
