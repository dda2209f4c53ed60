"""The connectors give what timm, open_clip and transformers give with the same weights."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.transformer import AttentionalPooler
from timm.layers import AttentionPoolLatent, LayerNorm2d, resample_abs_pos_embed
from timm.models.regnet import RegStage
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from megatron_mm1.config.schema import ConnectorConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.connectors import CONNECTORS, build_connector
from megatron_mm1.model.connectors.c_abstractor import regnet_stage

TOLERANCE = 1e-4
VISION, DECODER = 20, 24
CONFIG = ConnectorConfig(tokens_per_image=9, hidden_size=16, num_layers=3, num_attention_heads=4)
NAMES = sorted(CONNECTORS)


def build(name: str, *, grid: tuple[int, int] = (5, 5), **changes: Any) -> Any:
    tokens = grid[0] * grid[1] if name == "mlp" else CONFIG.tokens_per_image
    config = replace(CONFIG, connector=name, **{"tokens_per_image": tokens, **changes})
    connector = build_connector(config, vision_hidden_size=VISION, hidden_size=DECODER, grid=grid)
    randomize(connector)
    return connector


def randomize(module: Any, *, seed: int = 0) -> None:
    """Fill every parameter, norms and biases too, with distinct random values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def features(count: int = 2, grid: tuple[int, int] = (5, 5), width: int = VISION) -> Tensor:
    return torch.randn(count, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(5))


def copy_in_order(target: Any, source: Any) -> None:
    """Copy weights between modules of the same parts in the same order; 1 x 1 convolutions may be linear layers."""
    targets, sources = list(target.parameters()), list(source.parameters())
    assert len(targets) == len(sources)
    for ours, theirs in zip(targets, sources, strict=True):
        assert ours.numel() == theirs.numel()
        ours.data.copy_(theirs.data.view(ours.shape))


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert reference.std() > 0.1  # a comparison of something
    assert (ours - reference).abs().max() <= TOLERANCE


def timm_stage(in_channels: int) -> Any:
    return RegStage(3, in_channels, CONFIG.hidden_size, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)


@pytest.mark.parametrize("in_channels", [VISION, CONFIG.hidden_size])
def test_regnet_stage_equals_timm(in_channels: int) -> None:
    reference = timm_stage(in_channels)
    randomize(reference)
    stage = regnet_stage(in_channels, CONFIG.hidden_size, depth=3)
    copy_in_order(stage, reference)
    image = torch.randn(2, in_channels, 5, 6)
    assert_close(stage(image), reference(image))


@pytest.mark.parametrize("grid", [(5, 5), (6, 6), (8, 4)])
def test_c_abstractor_equals_honeybees_of_timm_parts(grid: tuple[int, int]) -> None:
    connector = build("c_abstractor")
    stage1, stage2 = timm_stage(VISION), timm_stage(CONFIG.hidden_size)
    readout = nn.Sequential(nn.Linear(CONFIG.hidden_size, DECODER), nn.SiLU(), nn.Linear(DECODER, DECODER))
    for theirs, ours in ((stage1, connector.stage1), (stage2, connector.stage2), (readout, connector.readout)):
        copy_in_order(theirs, ours)
    positions = connector.position_embeddings[None]
    x = features(grid=grid) + resample_abs_pos_embed(positions, list(grid), [5, 5], num_prefix_tokens=0)
    image = stage1(x.transpose(1, 2).reshape(2, VISION, *grid))
    image = stage2(nn.AdaptiveAvgPool2d((3, 3))(image))
    assert_close(connector(features(grid=grid), grid), readout(image.flatten(2).transpose(1, 2)))


def test_average_pool_of_a_grid_that_divides() -> None:
    connector = build("average_pool", grid=(6, 6))
    image = features(grid=(6, 6)).transpose(1, 2).view(2, VISION, 3, 2, 3, 2)
    pooled = image.mean((3, 5)).flatten(2).transpose(1, 2)
    assert_close(connector(features(grid=(6, 6)), (6, 6)), connector.projection(pooled))


@pytest.mark.parametrize("grid", [(5, 5), (4, 7)])
def test_average_pool_of_any_grid(grid: tuple[int, int]) -> None:
    """Token (i, j) is the mean over rows floor(i h / 3) to ceil((i + 1) h / 3), and likewise columns."""
    rows, columns = grid
    connector = build("average_pool")
    image = features(grid=grid).view(2, rows, columns, VISION)
    pooled = [
        image[:, i * rows // 3 : -(-(i + 1) * rows // 3), j * columns // 3 : -(-(j + 1) * columns // 3)].mean((1, 2))
        for i in range(3)
        for j in range(3)
    ]
    assert_close(connector(features(grid=grid), grid), connector.projection(torch.stack(pooled, dim=1)))


def test_attention_pool_equals_cocas() -> None:
    connector = build("attention_pool")
    reference = AttentionalPooler(CONFIG.hidden_size, VISION, n_head=4, n_queries=9)
    reference.query.data.copy_(connector.queries)
    for theirs, ours in (
        (reference.attn, connector.attention),
        (reference.ln_q, connector.query_layernorm),
        (reference.ln_k, connector.feature_layernorm),
    ):
        theirs.load_state_dict(ours.state_dict())
    assert_close(connector(features(), (5, 5)), connector.projection(reference(features())))


def test_attention_pool_attends_as_timm_does() -> None:
    width = CONFIG.hidden_size
    connector = build_connector(
        replace(CONFIG, connector="attention_pool"), vision_hidden_size=width, hidden_size=DECODER, grid=(5, 5)
    )
    randomize(connector)
    attention = connector.attention  # type: ignore[attr-defined]
    reference: Any = AttentionPoolLatent(width, num_heads=4, latent_len=9, pool_type="")
    reference.mlp = None
    reference.latent.data.copy_(connector.query_layernorm(connector.queries)[None])  # type: ignore[attr-defined]
    for name in ("weight", "bias"):
        query, *key_value = getattr(attention, f"in_proj_{name}").chunk(3)
        getattr(reference.q, name).data.copy_(query)
        getattr(reference.kv, name).data.copy_(torch.cat(key_value))
    reference.proj.load_state_dict(attention.out_proj.state_dict())
    pooled = reference(connector.feature_layernorm(features(width=width)))  # type: ignore[attr-defined]
    assert_close(connector(features(width=width), (5, 5)), connector.projection(pooled))  # type: ignore[attr-defined]


def test_mlp_equals_llavas() -> None:
    connector = build("mlp")
    vision = CLIPVisionConfig(hidden_size=VISION, num_attention_heads=4)
    text = LlamaConfig(hidden_size=DECODER, num_attention_heads=4)
    reference = LlavaMultiModalProjector(LlavaConfig(vision_config=vision, text_config=text))
    reference.load_state_dict(connector.state_dict())
    assert_close(connector(features(), (5, 5)), reference(features()))


@pytest.mark.parametrize("name", NAMES)
class TestEveryConnector:
    def test_gives_the_tokens_it_promises(self, name: str) -> None:
        connector = build(name)
        assert connector(features(3), (5, 5)).shape == (3, 25 if name == "mlp" else 9, DECODER)

    def test_learns_with_every_parameter(self, name: str) -> None:
        connector = build(name)
        connector(features(), (5, 5)).square().sum().backward()
        still = [name for name, parameter in connector.named_parameters() if not parameter.grad.any()]
        assert not still

    def test_gives_zero_gradients_for_no_image(self, name: str) -> None:
        connector = build(name)
        tokens = connector(features(0).requires_grad_(), (5, 5))
        assert tokens.shape == (0, 25 if name == "mlp" else 9, DECODER)
        tokens.sum().backward()
        for parameter_name, parameter in connector.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.any(), parameter_name

    def test_treats_images_alone(self, name: str) -> None:
        connector = build(name)
        together = connector(features(3), (5, 5))
        torch.testing.assert_close(connector(features(3)[1:2], (5, 5)), together[1:2], atol=1e-5, rtol=1e-5)

    def test_in_bfloat16_stays_close_to_float32(self, name: str) -> None:
        connector = build(name)
        exact = connector(features(), (5, 5))
        tokens = connector.bfloat16()(features().bfloat16(), (5, 5))
        assert tokens.dtype == torch.bfloat16
        assert (tokens.float() - exact).norm() < 0.05 * exact.norm()
        tokens.float().sum().backward()

    def test_starts_alike_from_the_same_seed(self, name: str) -> None:
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            tokens = 25 if name == "mlp" else 9
            config = replace(CONFIG, connector=name, tokens_per_image=tokens)
            connector: Any = build_connector(config, vision_hidden_size=VISION, hidden_size=DECODER, grid=(5, 5))
            states.append(connector.state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def test_refuses_options(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"options has depth, but the built-in {name} takes none"):
            build(name, options={"depth": 3})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mlp", {"tokens_per_image": 9}, "tokens_per_image is 9, but mlp .* 5 x 5 = 25 patches: set it to 25"),
        ("average_pool", {"tokens_per_image": 10}, "tokens_per_image is 10, .* use 9 or 16"),
        ("c_abstractor", {"tokens_per_image": 10}, "tokens_per_image is 10, .* use 9 or 16"),
        ("attention_pool", {"hidden_size": 18}, "hidden_size 18 is not divisible by .*num_attention_heads 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **changes)


def test_mlp_refuses_another_grid() -> None:
    with pytest.raises(UserError, match="6 x 5 = 30 patches has no place in 25 token slots"):
        build("mlp")(features(grid=(6, 5)), (6, 5))


class Custom(nn.Module):
    """A connector of the user's own."""

    def __init__(self, config: ConnectorConfig, *, scale: float, **sizes: Any) -> None:
        super().__init__()
        self.seen = SimpleNamespace(config=config, scale=scale, **sizes)


def test_a_class_path_chooses_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("users_package")
    package.Custom = Custom  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_package", package)
    make = partial(build_connector, vision_hidden_size=VISION, hidden_size=DECODER, grid=(5, 5))
    config = replace(CONFIG, connector="users_package.Custom", options={"scale": 2.0})
    seen = make(config).seen  # type: ignore[attr-defined]
    assert (seen.config, seen.scale, seen.vision_hidden_size, seen.hidden_size) == (config, 2.0, VISION, DECODER)
    with pytest.raises(UserError, match=r"missing a required .*argument: 'scale'"):
        make(replace(config, options={}))


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown connector 'c_abstracter'.*did you mean 'c_abstractor'"):
        build("c_abstracter")
