"""The vision tower gives what transformers and open_clip give with the same weights."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from megatron_mm1.checkpoint.families import import_tensors
from megatron_mm1.checkpoint.local_state import local_state_dict
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config.schema import DecoderConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.positions import interpolate_positions
from megatron_mm1.model.vision import VisionTower, build_tower, vision_layer_spec, vision_transformer_config
from megatron_mm1.parallel.device import transformer_engine_problem

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

TOLERANCE = 1e-4
CLIP = VisionConfig(
    image_size=28,
    patch_size=7,
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=4,
    layernorm_epsilon=0.01,  # large enough to be seen
)
SIGLIP = replace(
    CLIP,
    activation="gelu_tanh",
    layernorm_epsilon=1e-6,
    class_token=False,
    pre_layernorm=False,
    patch_bias=True,
)


def randomize(module: torch.nn.Module, *, seed: int = 0) -> None:
    """Fill every parameter, norms and biases too, with distinct random values that neither vanish nor saturate."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.dim() > 1 else 0.5
        offset = 1.0 if "norm" in name or "ln_" in name else 0.0
        parameter.data.copy_(offset + scale * noise)


def build(
    config: VisionConfig, groups: "ProcessGroupCollection", *, precision: str = "fp32", backend: str = "local"
) -> VisionTower:
    tower = build_tower(
        config,
        transformer_config=vision_transformer_config(config, parallel=ParallelConfig(), precision=precision),
        layer_spec=vision_layer_spec(backend),
        pg_collection=groups,
    )
    assert isinstance(tower, VisionTower)
    return tower


def imported(state: dict[str, Tensor], family: str, config: VisionConfig) -> dict[str, Tensor]:
    """A pretrained tower's tensors by the names they have in our checkpoints."""
    decoder = DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    return collect(import_tensors(family, ModelConfig(decoder=decoder, vision=config), StateDict(state)))


def load(
    config: VisionConfig, groups: "ProcessGroupCollection", reference: torch.nn.Module, family: Any
) -> VisionTower:
    tower = build(config, groups)
    tower.load_state_dict(local_state_dict(imported(reference.state_dict(), family, config), prefix="tower."))
    return tower


def images(count: int, height: int = 28, width: int = 28) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert reference.std() > 0.1  # a comparison of something
    assert (ours - reference).abs().max() <= TOLERANCE


def transformers_clip() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act="quick_gelu",
        layer_norm_eps=CLIP.layernorm_epsilon,
    )
    model = CLIPVisionModel(config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
def test_clip_features_before_the_last_norm(groups: "ProcessGroupCollection", feature_layer: int) -> None:
    reference = transformers_clip()
    config = replace(CLIP, feature_layer=feature_layer, final_layernorm=False)
    expected = reference(images(2), output_hidden_states=True).hidden_states[feature_layer][:, 1:]
    assert_close(load(config, groups, reference, "clip")(images(2)), expected)


def test_clip_features_after_the_last_norm(groups: "ProcessGroupCollection") -> None:
    reference = transformers_clip()
    hidden_states = reference(images(2)).last_hidden_state  # transformers norms the pooled token only
    assert_close(load(CLIP, groups, reference, "clip")(images(2)), reference.post_layernorm(hidden_states)[:, 1:])


def test_clip_on_another_grid(groups: "ProcessGroupCollection", monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers resamples without antialiasing, so it is given our positions; what is compared is their place."""
    reference = transformers_clip()
    pixels = images(2, 42, 21)
    tower = load(CLIP, groups, reference, "clip")
    assert tower.grid(42, 21) == (6, 3)
    resampled = resample_abs_pos_embed(reference.embeddings.position_embedding.weight[None], [6, 3], [4, 4])
    monkeypatch.setattr(reference.embeddings, "interpolate_pos_encoding", lambda *_: resampled)
    hidden_states = reference(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_close(tower(pixels), reference.post_layernorm(hidden_states)[:, 1:])


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_siglip_features(groups: "ProcessGroupCollection", activation: Any) -> None:
    reference = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            hidden_act={"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[activation],
        )
    ).eval()
    randomize(reference)
    tower = load(replace(SIGLIP, activation=activation), groups, reference, "siglip")
    assert_close(tower(images(2)), reference(images(2)).last_hidden_state)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_features(groups: "ProcessGroupCollection", activation: Any) -> None:
    act_layer = QuickGELU if activation == "quick_gelu" else torch.nn.GELU
    reference = OpenClipVisionTransformer(28, 7, 32, 3, 4, 2.5, act_layer=act_layer, output_tokens=True).eval()
    randomize(reference)
    _, tokens = reference(images(2))
    config = replace(CLIP, activation=activation, layernorm_epsilon=1e-5)
    assert_close(load(config, groups, reference, "open_clip")(images(2)), tokens)


@pytest.mark.parametrize("config", [CLIP, SIGLIP, replace(CLIP, feature_layer=-2, final_layernorm=False)])
def test_no_image_gives_zero_gradients(groups: "ProcessGroupCollection", config: VisionConfig) -> None:
    tower = build(config, groups)
    features = tower(torch.empty(0, 3, 28, 28))
    assert features.shape == (0, 16, 32)
    features.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_parameter_learns(groups: "ProcessGroupCollection") -> None:
    tower = build(CLIP, groups)
    tower(images(2)).square().mean(dim=(0, 1)).mul(torch.randn(32)).sum().backward()
    still = [name for name, parameter in tower.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still


def test_bfloat16_stays_close_to_float32(groups: "ProcessGroupCollection") -> None:
    exact = build(CLIP, groups)
    tower = build(CLIP, groups, precision="bf16")
    tower.load_state_dict(exact.state_dict())
    features = tower(images(2))
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact(images(2))).abs().max() < 0.1
    features.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_distributed_checkpoints_name_tensors_as_transformer_engine_does(groups: "ProcessGroupCollection") -> None:
    names = imported(transformers_clip().state_dict(), "clip", CLIP).keys()
    assert "tower.encoder.layers.2.self_attention.linear_qkv.layer_norm_weight" in names
    sharded = build(CLIP, groups).sharded_state_dict("tower.", metadata={"non_homogeneous_layers": True})
    keys = {tensor.key for tensor in sharded.values()}
    assert {key for key in keys if not key.endswith("_extra_state")} == names


@pytest.mark.gpu
@pytest.mark.skipif(
    transformer_engine_problem() is not None, reason=f"Transformer Engine: {transformer_engine_problem()}"
)
def test_transformer_engine_equals_local(groups: "ProcessGroupCollection") -> None:
    reference = transformers_clip()
    tensors = imported(reference.state_dict(), "clip", CLIP)
    state = {
        "local": local_state_dict(tensors, prefix="tower."),
        "transformer_engine": {name.removeprefix("tower."): tensor for name, tensor in tensors.items()},
    }
    features = {}
    for backend, weights in state.items():
        tower = build(CLIP, groups, precision="bf16", backend=backend).cuda()
        tower.load_state_dict(weights, strict=False)  # Transformer Engine's _extra_state is not in it
        features[backend] = tower(images(2).cuda()).float()
    assert (features["local"] - features["transformer_engine"]).abs().max() < 0.15


@pytest.mark.parametrize("to_grid", [(7, 7), (3, 3), (9, 4)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_positions_are_resampled_as_timm_does(to_grid: tuple[int, int], prefix: int) -> None:
    positions = torch.randn(prefix + 20, 6)
    ours = interpolate_positions(positions, from_grid=(4, 5), to_grid=to_grid, prefix_tokens=prefix)
    timm = resample_abs_pos_embed(positions[None], list(to_grid), [4, 5], num_prefix_tokens=prefix)[0]
    torch.testing.assert_close(ours, timm, atol=1e-6, rtol=0)


@pytest.mark.parametrize("to_grid", [(7, 9), (3, 2)])
def test_positions_are_resampled_as_pillow_does(to_grid: tuple[int, int]) -> None:
    positions = torch.randn(20, 1)
    ours = interpolate_positions(positions, from_grid=(4, 5), to_grid=to_grid).view(to_grid)
    image = Image.fromarray(positions.view(4, 5).numpy()).resize(to_grid[::-1], Image.Resampling.BICUBIC)
    torch.testing.assert_close(ours, torch.from_numpy(np.array(image)), atol=1e-5, rtol=0)


def test_positions_of_the_same_grid_are_not_touched() -> None:
    positions = torch.randn(17, 6, dtype=torch.bfloat16)
    assert interpolate_positions(positions, from_grid=(4, 4), to_grid=(4, 4), prefix_tokens=1) is positions


@pytest.mark.parametrize("layer", [0, -4])
def test_feature_layer_must_be_a_block(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"feature_layer is {layer}, but a tower of 3 blocks has -3 to -1"):
        vision_transformer_config(replace(CLIP, feature_layer=layer), parallel=ParallelConfig(), precision="fp32")


def test_image_size_must_divide_into_patches(groups: "ProcessGroupCollection") -> None:
    with pytest.raises(UserError, match="30 x 28 px does not divide into patches of 7 px"):
        build(CLIP, groups)(images(1, 30, 28))
