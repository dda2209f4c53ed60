"""Image encoders of transformers and open_clip become ours and ours theirs: the same features, the same tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import _build_vision_tower
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_mm1.checkpoint.families import export_model, import_model
from megatron_mm1.checkpoint.local_state import local_state_dict
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config.schema import DecoderConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_mm1.model.vision import build_tower, vision_layer_spec, vision_transformer_config
from tests import pretrained

BASE = ModelConfig(decoder=DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1))
CLIP_VISION = dict(pretrained.TOWER, layer_norm_eps=0.01, hidden_act="quick_gelu", projection_dim=16)
SIGLIP_VISION = dict(pretrained.TOWER, layer_norm_eps=0.01)
TEXT = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
OPEN_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 3, "width": 32, "head_width": 8, "patch_size": 7, "mlp_ratio": 2.5},
}
TRANSFORMERS = {
    "CLIPVisionModel": (CLIPVisionModel, CLIPVisionConfig(**CLIP_VISION)),
    "CLIPVisionModel, gelu": (CLIPVisionModel, CLIPVisionConfig(**{**CLIP_VISION, "hidden_act": "gelu"})),
    "with a projection": (CLIPVisionModelWithProjection, CLIPVisionConfig(**CLIP_VISION)),
    "in a CLIPModel": (CLIPModel, CLIPConfig(vision_config=CLIP_VISION, text_config=TEXT, projection_dim=16)),
    "SiglipVisionModel": (SiglipVisionModel, SiglipVisionConfig(**SIGLIP_VISION)),
    "in a SiglipModel": (SiglipModel, SiglipConfig(vision_config=SIGLIP_VISION, text_config=TEXT)),
}


def images() -> Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def our_features(vision: VisionConfig, tensors: dict[str, Tensor], groups: Any) -> Tensor:
    tower = build_tower(
        vision,
        transformer_config=vision_transformer_config(vision, parallel=ParallelConfig(), precision="fp32"),
        layer_spec=vision_layer_spec("local"),
        pg_collection=groups,
    )
    tower.load_state_dict(local_state_dict(tensors, prefix="tower."))
    with torch.no_grad():
        return tower(images())


def features(tower: Any) -> Tensor:
    """Of each patch, after the last norm."""
    with torch.no_grad():
        hidden_states = tower(images()).last_hidden_state
        if isinstance(tower, CLIPVisionModel):  # norms the pooled token only
            return tower.post_layernorm(hidden_states)[:, 1:]
        return hidden_states


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert reference.std() > 0.1  # a comparison of something
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_a_tower_of_transformers(case: str, groups: Any, tmp_path: Path) -> None:
    cls, settings = TRANSFORMERS[case]
    theirs = cls(settings).eval()
    pretrained.randomize(theirs)
    tower = getattr(theirs, "vision_model", theirs)
    config, source = pretrained.saved(theirs, tmp_path / "theirs")

    model, plan = import_model(config, source, base=BASE)
    ours = collect(plan)
    assert_close(our_features(model.vision, ours, groups), features(tower))
    assert model.vision.image_mean == ((0.5,) * 3 if "Siglip" in cls.__name__ else VisionConfig().image_mean)

    family = "siglip" if "Siglip" in cls.__name__ else "clip"
    exported, plan = export_model(family, model, StateDict(ours))
    tensors = collect(plan)
    whole = tower.state_dict()
    pretrained.assert_same_tensors(
        tensors, {f"vision_model.{name}": tensor for name, tensor in whole.items() if not name.startswith("head.")}
    )
    again = pretrained.load_strictly(
        CLIPVisionModel if family == "clip" else SiglipVisionModel, exported, tensors, tmp_path / "exported"
    )
    assert torch.equal(features(again), features(tower))


@pytest.mark.parametrize(
    ("quick_gelu", "settings"),
    [
        (True, {}),
        (False, {}),
        (False, {"act_kwargs": {"approximate": "tanh"}}),
        (True, {"norm_kwargs": {"eps": 0.01}}),
        (True, {"no_ln_pre": True}),
    ],
)
@pytest.mark.parametrize("resize_mode", ["squash", "shortest", None])
def test_a_tower_of_open_clip(quick_gelu: bool, settings: dict[str, Any], resize_mode: str | None, groups: Any) -> None:
    whole = resize_mode is not None
    vision_cfg = {**OPEN_CLIP["vision_cfg"], **settings}
    reference = _build_vision_tower(24, {**vision_cfg, "output_tokens": True}, quick_gelu=quick_gelu).eval()
    pretrained.randomize(reference)
    with torch.no_grad():
        expected = reference(images())[1]
    prefix = "visual." if whole else ""
    state = {f"{prefix}{name}": tensor for name, tensor in reference.state_dict().items()}
    if whole:
        state |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(16)}
    config = {**OPEN_CLIP, "quick_gelu": quick_gelu, "vision_cfg": vision_cfg}
    pixels = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bicubic",
        "resize_mode": resize_mode,
    }
    if whole:
        config = {"model_cfg": config, "preprocess_cfg": pixels}

    model, plan = import_model(config, StateDict(state), base=BASE)
    ours = collect(plan)
    assert_close(our_features(model.vision, ours, groups), expected)
    assert model.vision.image_std == ((0.4, 0.5, 0.6) if whole else VisionConfig().image_std)
    assert model.vision.image_resize == ("shorter_side_crop" if resize_mode == "shortest" else "squash")

    exported, plan = export_model("open_clip", model, StateDict(ours))
    tensors = {name.removeprefix("visual."): tensor for name, tensor in collect(plan).items()}
    cfg = exported["model_cfg"]
    again = _build_vision_tower(
        cfg["embed_dim"], {**cfg["vision_cfg"], "output_tokens": True}, quick_gelu=cfg["quick_gelu"]
    ).eval()
    again.load_state_dict(tensors)
    pretrained.assert_same_tensors(tensors, {**reference.state_dict(), "proj": torch.eye(32)})
    with torch.no_grad():
        assert torch.equal(again(images())[1], expected)
    assert not whole or exported["preprocess_cfg"] == pixels


def test_an_earlier_block_of_clip_is_exported_as_the_last(groups: Any, tmp_path: Path) -> None:
    theirs = CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION)).eval()
    pretrained.randomize(theirs)
    config, source = pretrained.saved(theirs, tmp_path / "theirs")
    base = replace(BASE, vision=VisionConfig(feature_layer=-2, final_layernorm=False))
    model, plan = import_model(config, source, base=base)
    with torch.no_grad():
        expected = theirs(images(), output_hidden_states=True).hidden_states[-2]
    ours = collect(plan)
    assert_close(our_features(model.vision, ours, groups), expected[:, 1:])

    exported, plan = export_model("clip", model, StateDict(ours))
    assert exported["num_hidden_layers"] == 2
    again = pretrained.load_strictly(CLIPVisionModel, exported, collect(plan), tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(again(images()).last_hidden_state, expected)
