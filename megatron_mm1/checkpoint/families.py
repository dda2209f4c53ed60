"""Other projects' models that weights are taken from and given to, by family."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm1.checkpoint import llava
from megatron_mm1.checkpoint.decoder_configs import DECODERS, export_decoder_config, import_decoder_config
from megatron_mm1.checkpoint.decoders import decoder_correspondence
from megatron_mm1.checkpoint.image_processors import import_image_processor
from megatron_mm1.checkpoint.rules import Correspondence, export_plan, import_plan
from megatron_mm1.checkpoint.tensors import Plan, TensorSource
from megatron_mm1.checkpoint.tower_configs import export_tower_config, import_tower_config
from megatron_mm1.checkpoint.towers import TOWERS, tower_correspondence
from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.config.schema import DataConfig, ModelConfig
from megatron_mm1.errors import UserError


@dataclass(frozen=True)
class Family:
    """What a family is, for people, and the parts of an MM1 (keys of COMPONENTS) it has."""

    summary: str
    components: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama: no biases, no QK-norm", ("decoder",)),
    "mistral": Family("Mistral: as llama", ("decoder",)),
    "qwen2": Family("Qwen2 and Qwen2.5: qkv bias", ("decoder",)),
    "qwen3": Family("Qwen3, dense: QK-norm", ("decoder",)),
    "qwen2_moe": Family("Qwen2-MoE without shared expert: MM1's own experts", ("decoder",)),
    "qwen3_moe": Family("Qwen3-MoE: experts and QK-norm", ("decoder",)),
    "clip": Family("transformers' CLIPVisionModel, or that part of a CLIPModel", ("tower",)),
    "siglip": Family("transformers' SiglipVisionModel, or that part of a SiglipModel", ("tower",)),
    "open_clip": Family("open_clip's vision transformer (open_clip_config.json)", ("tower",)),
    "llava": Family("transformers' LLaVA: a whole MM1 with the mlp connector", ("tower", "connector", "decoder")),
}

WITH_IMAGE_PROCESSOR = ("clip", "siglip", "llava")
"""Families that say in a file of its own, transformers' preprocessor_config.json, what images they take."""

_MODEL_TYPES: Mapping[str, str] = {
    **{name: name for name in FAMILIES},
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
}
_ARCHITECTURES: Mapping[str, str] = {
    **{family.architecture: name for name, family in DECODERS.items()},
    "CLIPModel": "clip",
    "CLIPVisionModel": "clip",
    "CLIPVisionModelWithProjection": "clip",
    "SiglipModel": "siglip",
    "SiglipVisionModel": "siglip",
    "LlavaForConditionalGeneration": "llava",
}


def family_of(theirs: Mapping[str, Any]) -> str:
    """The family of a model, from its config.json or open_clip_config.json.

    Raises:
        UserError: it is none of FAMILIES.
    """
    if "vision_cfg" in theirs.get("model_cfg", theirs):
        return "open_clip"
    model_type, architectures = theirs.get("model_type"), theirs.get("architectures") or []
    names = [_MODEL_TYPES.get(model_type or "")] if model_type else [_ARCHITECTURES.get(name) for name in architectures]
    for name in names:
        if name is not None:
            return name
    raise UserError(
        f"a model of type {model_type or ', '.join(architectures) or 'unknown'} cannot be imported: supported are "
        f"{', '.join(FAMILIES)}"
    )


def import_model(
    theirs: Mapping[str, Any],
    source: TensorSource,
    *,
    base: ModelConfig,
    seq_length: int | None = None,
    image_processor: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, Plan]:
    """Another project's model as parts of an MM1.

    Args:
        theirs: its config.json or open_clip_config.json.
        source: its tensors.
        base: the configuration of what it does not have. Of a tower imported by itself, `feature_layer` and
            `final_layernorm` are what it says too.
        seq_length: positions the decoder will see; None: as many as it was made for.
        image_processor: its preprocessor_config.json, if there is one and it has a tower.

    Returns:
        `base` with the configuration of the imported parts, and the plan of their tensors under our names.

    Raises:
        UserError: every reason why it cannot be imported, or everything that is wrong with its tensors.
    """
    family = family_of(theirs)
    try:
        model = _import_config(family, theirs, base=base, seq_length=seq_length)
        if image_processor is not None and family in WITH_IMAGE_PROCESSOR:
            model = replace(model, vision=import_image_processor(image_processor, model.vision))
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"the configuration of this {family} is damaged: {type(error).__name__}: {error}") from error
    return model, import_tensors(family, model, source)


def import_tensors(family: str, model: ModelConfig, source: TensorSource) -> Plan:
    """The tensors of `family`'s parts of `model` under our names, of another project's in `source`.

    Raises:
        UserError: everything that is missing, left over or of another shape than `model` says.
    """
    correspondence, what = _correspondence(family, model), _describe(family, model)
    if family == "llava":
        return import_plan(correspondence, source, what=what, rename=llava.file_name)
    if family in DECODERS:
        return import_plan(correspondence, source, what=what)
    prefix = TOWERS[family].prefix
    if not any(name.startswith(prefix) for name in source.tensors):
        prefix = ""
    return import_plan(correspondence.renamed(lambda name: prefix + name), source, what=what, within=prefix)


def export_model(
    family: str,
    model: ModelConfig,
    source: TensorSource,
    *,
    seq_length: int = DataConfig.seq_length,
    image_token_id: int | None = None,
) -> tuple[dict[str, Any], Plan]:
    """The parts of an MM1 that `family` has, as a model of its.

    Args:
        source: the MM1's tensors; those of other parts are not looked at.
        seq_length: positions the decoder was trained on.
        image_token_id: for llava, the token that stands for an image's patches.

    Returns:
        Its config.json (open_clip: open_clip_config.json) and the plan of its tensors.

    Raises:
        UserError: every reason why this model cannot be one, or everything that is wrong with its tensors.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no family {family!r} to export to: use {', '.join(FAMILIES)}")
    ours = tuple(COMPONENTS[component] for component in FAMILIES[family].components)
    dtypes = [str(info.dtype).removeprefix("torch.") for name, info in source.tensors.items() if name.startswith(ours)]
    dtype = dtypes[0] if dtypes else "float32"
    correspondence = None
    if family == "llava":
        theirs = llava.export_llava_config(model, seq_length=seq_length, image_token_id=image_token_id, dtype=dtype)
    elif family in DECODERS:
        theirs = export_decoder_config(DECODERS[family], model, seq_length=seq_length, dtype=dtype)
    else:
        theirs = export_tower_config(family, model.vision, dtype=dtype)
        prefix = TOWERS[family].prefix
        correspondence = _correspondence(family, model).renamed(lambda name: prefix + name)
    correspondence = correspondence or _correspondence(family, model)
    return theirs, export_plan(correspondence, source, what=f"the MM1 that is to be a {family}")


def _import_config(family: str, theirs: Mapping[str, Any], *, base: ModelConfig, seq_length: int | None) -> ModelConfig:
    if family == "llava":
        return llava.import_llava_config(theirs, base=base, seq_length=seq_length)
    if family in DECODERS:
        return import_decoder_config({**theirs, "model_type": family}, base=base, seq_length=seq_length)
    if family in ("clip", "siglip") and "vision_config" in theirs:
        theirs = {**theirs["vision_config"], **(theirs.get("vision_config_dict") or {})}
    return replace(base, vision=import_tower_config(family, theirs, base=base.vision))


def _correspondence(family: str, model: ModelConfig) -> Correspondence:
    if family == "llava":
        return llava.llava_correspondence(model)
    if family in DECODERS:
        return decoder_correspondence(model, shared_expert_gate=DECODERS[family].shared_expert)
    return tower_correspondence(family, model.vision)


def _describe(family: str, model: ModelConfig) -> str:
    if "decoder" in FAMILIES[family].components:
        return f"a {family} of {model.decoder.num_layers} blocks"
    return f"a {family} image encoder of {model.vision.num_layers} blocks"
