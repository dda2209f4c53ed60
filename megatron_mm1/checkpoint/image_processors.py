"""What images a tower takes, as transformers' image processors say it, in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from megatron_mm1.checkpoint.safetensors_folder import IMAGE_PROCESSOR, PROCESSOR
from megatron_mm1.checkpoint.tower_configs import PIXELS
from megatron_mm1.config.schema import VisionConfig
from megatron_mm1.errors import UserError

Config = Mapping[str, Any]

_BICUBIC = 3
_COMMON: Config = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": _BICUBIC,
    "rescale_factor": 1 / 255,
}
_CLIP: Config = {
    **_COMMON,
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "do_center_crop": True,
    "image_mean": PIXELS["clip"][0],
    "image_std": PIXELS["clip"][1],
}
DEFAULTS: Mapping[str, Config] = {
    "CLIP": _CLIP,
    "Llava": {**_CLIP, "do_pad": False},
    "Siglip": {
        **_COMMON,
        "size": {"height": 224, "width": 224},
        "image_mean": PIXELS["siglip"][0],
        "image_std": PIXELS["siglip"][1],
    },
}
"""What transformers' image processors take where their configuration says nothing, by the beginning of their names."""


def import_image_processor(theirs: Config, vision: VisionConfig) -> VisionConfig:
    """`vision` with the way to squares, the mean and the standard deviation of an image processor.

    Raises:
        UserError: every reason why images cannot be prepared so here.
    """
    name = str(theirs.get("image_processor_type") or theirs.get("feature_extractor_type") or "none")
    kind = next((kind for kind in DEFAULTS if name.startswith((f"{kind}ImageProcessor", f"{kind}Feature"))), None)
    if kind is None:
        raise _refused(f"image processor {name}: supported are those of {', '.join(DEFAULTS)}")
    values = {**DEFAULTS[kind], **{key: value for key, value in theirs.items() if value is not None}}
    if kind != "Llava":
        values["do_pad"] = False  # only LLaVA's pads to squares
    mode = _resize(values, side=vision.image_size)
    reasons = list(_unsupported(values, mode, vision))
    if mode is None or reasons:
        raise _refused(*reasons)
    return replace(
        vision,
        image_resize=mode,
        image_mean=tuple(values["image_mean"]),
        image_std=tuple(values["image_std"]),
    )


def _refused(*reasons: str) -> UserError:
    way_out = f"without {IMAGE_PROCESSOR} (or {PROCESSOR}) the weights are imported all the same: see model.vision"
    return UserError("\n  ".join(["this model's images cannot be prepared here:", *reasons, way_out]))


def _resize(values: Config, *, side: int) -> Literal["squash", "shorter_side_crop", "pad"] | None:
    """How images become squares of `side`; None: in no way that we have."""
    size, crop = _size(values["size"]), _size(values.get("crop_size"))
    square = {"height": side, "width": side}
    crops = bool(values.get("do_center_crop"))
    if crops and crop not in (square, {"shortest_edge": side}):
        return None
    if size == square:
        return "pad" if values.get("do_pad") else "squash"
    if size == {"shortest_edge": side}:
        if values.get("do_pad"):
            return "pad"
        return "shorter_side_crop" if crops else None
    return None


def _size(size: Any) -> dict[str, int]:
    """Old files have a number: of the shorter side, or of a crop's both sides."""
    return dict(size) if isinstance(size, Mapping) else {"shortest_edge": size}


def _unsupported(values: Config, mode: str | None, vision: VisionConfig) -> Iterator[str]:
    if mode is None:
        keys = ("size", "do_pad", "do_center_crop", "crop_size")
        said = ", ".join(f"{key} {values[key]}" for key in keys if key in values)
        yield f"{said}: supported are squares of the tower's {vision.image_size} px, squashed, cut out or padded"
    if values["resample"] != _BICUBIC:
        yield f"resample {values['resample']}: images are resized bicubically here, which is {_BICUBIC}"
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not values[key]:
            yield f"{key} false: images are resized and normalised here"
    for key in ("image_mean", "image_std"):
        numbers = values[key]
        if len(numbers) != 3 or not all(isinstance(number, int | float) for number in numbers):
            yield f"{key} {numbers}: images here have three channels"
        elif key == "image_std" and min(numbers) <= 0:
            yield f"{key} {numbers}: pixels are divided by it"
    if abs(values["rescale_factor"] * 255 - 1) > 1e-6:
        yield f"rescale_factor {values['rescale_factor']}: pixels are 0 to 1 here before they are normalised"


def export_image_processor(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json for a tower's images. LLaVA's image processor pads, CLIP's does the rest."""
    side = vision.image_size
    square = {"height": side, "width": side}
    squash, pad = vision.image_resize == "squash", vision.image_resize == "pad"
    theirs = {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        **_COMMON,
        "do_convert_rgb": True,
        "size": square if squash else {"shortest_edge": side},
        "do_center_crop": not squash,
        "crop_size": square,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    return {**theirs, "do_pad": True} if pad else theirs
