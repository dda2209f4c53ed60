"""Imports and exports as a whole: nothing is lost, and what does not fit is said all at once."""

import dataclasses
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.model import _build_vision_tower
from open_clip.transform import image_transform
from torchvision.transforms.functional import to_pil_image

from megatron_mm1.checkpoint.decoder_configs import DECODERS
from megatron_mm1.checkpoint.families import FAMILIES, export_model, family_of, import_model
from megatron_mm1.checkpoint.tensors import Piece, Plan, StateDict, TensorInfo, collect
from megatron_mm1.checkpoint.tower_configs import DEFAULTS
from megatron_mm1.config import ConnectorConfig, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_mm1.data.images.geometry import square
from megatron_mm1.errors import UserError
from tests import pretrained

BASE = ModelConfig(decoder=DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1))


@st.composite
def decoder_settings(draw: Any, family: str) -> dict[str, Any]:
    """A small configuration of any shape that the family allows."""
    heads_per_group, groups, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    heads = heads_per_group * groups
    own_dim = family not in ("qwen2", "qwen2_moe")
    values = dict(
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=heads * draw(st.sampled_from([2, 4])) if own_dim else heads * dim,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=dim,
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e6]))},
    )
    if DECODERS[family].experts:
        experts = draw(st.integers(2, 5))
        values |= dict(
            num_experts=experts,
            num_experts_per_tok=draw(st.integers(2, experts)),
            moe_intermediate_size=draw(st.integers(1, 9)),
            norm_topk_prob=draw(st.booleans()),
            decoder_sparse_step=draw(st.integers(1, values["num_hidden_layers"])),
        )
    if family == "qwen2_moe":
        values["qkv_bias"] = draw(st.booleans())
    return values


@st.composite
def tower_settings(draw: Any) -> dict[str, Any]:
    heads, patch = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return dict(
        hidden_size=heads * draw(st.integers(1, 5)),
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        patch_size=patch,
        image_size=patch * draw(st.integers(1, 4)),
        hidden_act=draw(st.sampled_from(["quick_gelu", "gelu", "gelu_pytorch_tanh"])),
        layer_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
    )


def build(family: str, data: Any) -> Any:
    if family in pretrained.DECODER_CLASSES:
        return pretrained.decoder(family, **data.draw(decoder_settings(family)))
    tower = data.draw(tower_settings())
    if family == "clip":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**tower))
    if family == "siglip":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tower, vision_use_head=False))
    decoder = data.draw(st.sampled_from(["llama", "qwen2", "qwen3_moe"]))
    text = pretrained.decoder(decoder, **data.draw(decoder_settings(decoder))).config
    vision = transformers.CLIPVisionConfig(**tower)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=0, vision_feature_layer=-1,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )  # fmt: skip


def there_and_back(data: Any) -> None:
    family = data.draw(st.sampled_from(sorted(set(FAMILIES) - {"open_clip"})))
    model = build(family, data).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    pretrained.randomize(model)
    with TemporaryDirectory() as folder:
        theirs, source = pretrained.saved(model, Path(folder))
        config, plan = import_model(theirs, source, base=BASE)
        ours = collect(plan)
        exported, plan = export_model(family, config, StateDict(ours), image_token_id=0)
        tensors = collect(plan)
        assert import_model(exported, StateDict(tensors), base=BASE)[0] == config
        again = pretrained.load_strictly(type(model), exported, tensors, Path(folder) / "again")
    before = {name: tensor for name, tensor in model.state_dict().items() if not is_lost(name)}
    pretrained.assert_same_tensors({n: t for n, t in again.state_dict().items() if not is_lost(n)}, before)


@given(settings=tower_settings(), quick=st.booleans(), ratio=st.integers(1, 4))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_a_random_open_clip_tower_comes_back_bit_by_bit(settings: dict[str, Any], quick: bool, ratio: int) -> None:
    cfg = dict(
        layers=settings["num_hidden_layers"],
        width=settings["hidden_size"],
        head_width=settings["hidden_size"] // settings["num_attention_heads"],
        mlp_ratio=ratio,
        patch_size=settings["patch_size"],
        image_size=settings["image_size"],
    )
    tower = _build_vision_tower(7, cfg, quick_gelu=quick)
    pretrained.randomize(tower)
    state = tower.state_dict()
    theirs = {"embed_dim": 7, "quick_gelu": quick, "vision_cfg": cfg}
    model, plan = import_model(theirs, StateDict(state), base=BASE)
    exported, plan = export_model("open_clip", model, StateDict(collect(plan)))
    tensors = collect(plan)
    assert import_model(exported, StateDict(tensors), base=BASE)[0] == model
    expected = {f"visual.{name}": tensor for name, tensor in state.items() if name != "proj"}
    pretrained.assert_same_tensors({n: t for n, t in tensors.items() if n != "visual.proj"}, expected)


def is_lost(name: str) -> bool:
    """Whether a tensor of theirs takes no part in what ours computes."""
    return "shared_expert_gate" in name or "vision_tower.post_layernorm" in name


@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_a_random_model_comes_back_bit_by_bit(data: Any) -> None:
    there_and_back(data)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_random_models_come_back_bit_by_bit(data: Any) -> None:
    there_and_back(data)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_configuration_that_says_nothing_means_transformers_defaults(family: str) -> None:
    cls = pretrained.DECODER_CLASSES[family].config_class
    for key, value in DECODERS[family].defaults.items():
        found = cls.default_theta if key == "rope_theta" else getattr(cls, key, None)
        assert found == value, key


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_tower_configuration_that_says_nothing_means_transformers_defaults(family: str) -> None:
    cls = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[family]
    assert {key: getattr(cls(), key) for key in DEFAULTS[family]} == DEFAULTS[family]


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "qwen3_moe"),
        ({"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}, "clip"),
        ({"model_type": "siglip"}, "siglip"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {}}}, "open_clip"),
        ({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}, "open_clip"),
        ({"model_type": "llava"}, "llava"),
    ],
)
def test_the_family_is_known_by_the_configuration(config: dict[str, Any], family: str) -> None:
    assert family_of(config) == family


@pytest.mark.parametrize("config", [{"model_type": "granite"}, {"architectures": ["GPT2LMHeadModel"]}, {}])
def test_another_family_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"a model of type \w+ cannot be imported: supported are llama, mistral, qwen2"):
        import_model(config, StateDict({}), base=BASE)


WINDOW = dict(use_sliding_window=True, sliding_window=16)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", dict(attention_bias=True), "attention_bias True: there is no counterpart"),
    ("qwen3", dict(attention_bias=True), "attention_bias True"),
    ("llama", dict(mlp_bias=True), "mlp_bias True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act gelu: there is no counterpart, supported is silu"),
    ("llama", dict(embedding_multiplier=12.0), "embedding_multiplier 12.0"),
    ("llama", dict(logits_scaling=8.0), "logits_scaling 8.0"),
    ("qwen3", dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
    ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5: only whole heads"),
    ("llama", dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), "rotary scaling of type linear"),
    ("qwen2", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rotary scaling of type yarn"),
    ("qwen2", dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "of type per layer type"),
    (
        "llama",
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}),
        "llama3 rotary scaling with high_freq_factor 2.0, original_max_position_embeddings None: supported is",
    ),
    ("mistral", dict(sliding_window=16), "sliding_window 16 is shorter than the sequences of 64 positions"),
    ("qwen2", dict(WINDOW, max_window_layers=1), "sliding_window 16 is shorter"),
    ("qwen3", dict(WINDOW, layer_types=["full_attention", "sliding_attention"]), "sliding_window 16 is shorter"),
    ("qwen3_moe", WINDOW, "sliding_window 16 is shorter"),
    ("qwen3", dict(layer_types=["full_attention", "linear_attention"]), "layer_types linear_attention"),
    ("qwen2_moe", dict(shared_expert_intermediate_size=32), "shared_expert_intermediate_size 32"),
    ("qwen2_moe", dict(mlp_only_layers=[0]), r"mlp_only_layers \[0\]"),
    ("qwen3_moe", dict(num_experts_per_tok=1), "norm_topk_prob with num_experts_per_tok 1"),
]


def plain_config(family: str) -> dict[str, Any]:
    return {"model_type": family, **pretrained.DECODER, **pretrained.FAMILY_SETTINGS[family]}


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_our_decoder_does_not_compute_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_model({**plain_config(family), **change}, StateDict({}), base=BASE)


def test_all_reasons_are_given_at_once() -> None:
    config = {**plain_config("llama"), "attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.5}
    with pytest.raises(UserError) as caught:
        import_model(config, StateDict({}), base=BASE)
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("family", "change", "seq_length"),
    [
        ("mistral", dict(sliding_window=16), 16),
        ("mistral", dict(sliding_window=None), None),
        ("qwen2", dict(use_sliding_window=False, sliding_window=16), None),
        ("qwen2", dict(WINDOW, max_window_layers=2), None),
        ("qwen3", dict(WINDOW, layer_types=["full_attention"] * 2), None),
        ("qwen3_moe", WINDOW, 16),
    ],
)
def test_a_window_that_hides_nothing_is_none(family: str, change: dict[str, Any], seq_length: int | None) -> None:
    with pytest.raises(UserError, match=r"the weights do not fit") as caught:  # and not the configuration
        import_model({**plain_config(family), **change}, StateDict({}), base=BASE, seq_length=seq_length)
    assert "missing: model.embed_tokens.weight [200, 48]" in str(caught.value)


TOWER = {"model_type": "clip_vision_model", **pretrained.TOWER}
OPEN_CLIP = {"image_size": 28, "layers": 3, "width": 32, "head_width": 8, "patch_size": 7}
REFUSED_TOWERS: list[tuple[dict[str, Any], str]] = [
    ({**TOWER, "hidden_act": "relu"}, "activation relu: supported are quick_gelu"),
    ({**TOWER, "num_channels": 1}, "num_channels 1: images here have 3"),
    ({**TOWER, "image_size": [28, 14]}, r"image_size \[28, 14\]: supported are squares"),
    ({"embed_dim": 8, "vision_cfg": {**OPEN_CLIP, "timm_model_name": "vit"}}, "timm_model_name vit"),
    ({"embed_dim": 8, "vision_cfg": {**OPEN_CLIP, "layers": [3, 4, 6, 3]}}, r"layers \[3, 4, 6, 3\]: that is a ResNet"),
    ({"embed_dim": 8, "vision_cfg": {**OPEN_CLIP, "attentional_pool": True}}, "attentional_pool True"),
    ({"embed_dim": 8, "vision_cfg": {**OPEN_CLIP, "ls_init_value": 0.1}}, "ls_init_value 0.1"),
    ({"model_type": "llava", "vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]: supported is one"),
    ({"model_type": "llava", "vision_feature_layer": 3}, "vision_feature_layer 3: supported is one block, -1"),
    ({"model_type": "llava", "vision_feature_select_strategy": "full"}, "vision_feature_select_strategy full"),
    ({"model_type": "llava", "projector_hidden_act": "relu"}, "projector_hidden_act relu: supported is gelu"),
    ({"model_type": "llava", "multimodal_projector_bias": False}, "multimodal_projector_bias false"),
    ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "text_config.model_type gemma: supported are"),
    ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "vision_config.model_type pixtral"),
    ({"model_type": "llava", "text_config": {"model_type": "llama", "mlp_bias": True}}, "mlp_bias True"),
    ({"model_type": "clip_vision_model", "patch_size": "x"}, "the configuration of this clip is damaged: ValueError"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED_TOWERS)
def test_what_our_tower_and_connector_do_not_compute_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_model(config, StateDict({}), base=BASE)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], StateDict]:
    return pretrained.saved(pretrained.decoder("llama"), tmp_path_factory.mktemp("llama"))


def faults(error: pytest.ExceptionInfo[UserError]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_everything_that_does_not_fit_is_listed_at_once(llama: tuple[dict[str, Any], StateDict]) -> None:
    config, source = llama
    state = dict(source.state)
    del state["model.norm.weight"], state["model.layers.1.self_attn.k_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 47)
    state["lm_head.weight"] = torch.zeros(256, 48)
    state["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(48, 48, dtype=torch.int8)
    state["model.layers.0.self_attn.k_proj.weight"] = state["model.layers.0.self_attn.k_proj.weight"].half()
    with pytest.raises(UserError, match=r"do not fit a llama of 2 blocks .* \(7 faults\)") as caught:
        import_model(config, StateDict(state), base=BASE)
    assert sorted(faults(caught)) == [
        "dtype: model.layers.0.self_attn.o_proj.weight is int8, expected plain floating point",
        "extra: model.layers.2.mlp.up_proj.weight [3, 4]",
        "missing: model.layers.1.self_attn.k_proj.weight [16, 48]",
        "missing: model.norm.weight [48]",
        "mixed: model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight, "
        "model.layers.0.self_attn.v_proj.weight make one tensor and are float16 and float32",
        "shape: lm_head.weight is [256, 48], expected [200, 48]",
        "shape: model.layers.0.mlp.up_proj.weight is [80, 47], expected [80, 48]",
    ]


def test_what_old_files_have_besides_is_no_fault(llama: tuple[dict[str, Any], StateDict]) -> None:
    config, source = llama
    old = {**source.state, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    old_config = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 500.0}
    assert import_model(old_config, StateDict(old), base=BASE)[0] == import_model(config, source, base=BASE)[0]


def test_a_missing_tensor_of_ours_is_listed_too(llama: tuple[dict[str, Any], StateDict]) -> None:
    model, plan = import_model(*llama, base=BASE)
    ours = collect(plan)
    del ours["language_model.decoder.final_norm.weight"]
    ours["language_model.decoder.layers.4.mlp.linear_fc2.weight"] = torch.zeros(1)
    ours["connector.readout.0.weight"] = torch.zeros(1)  # of a part that a llama has not
    with pytest.raises(UserError) as caught:
        export_model("llama", model, StateDict(ours))
    assert faults(caught) == [
        "missing: language_model.decoder.final_norm.weight [48]",
        "extra: language_model.decoder.layers.4.mlp.linear_fc2.weight [1]",
    ]


MOE = MoEConfig(num_moe_experts=4, moe_layer_freq=2)
BIASED = dataclasses.replace(MOE, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
INEXPRESSIBLE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", dict(decoder=dict(add_qkv_bias=True, qk_layernorm=True)), ["add_qkv_bias is True", "qk_layernorm is"]),
    ("llama", dict(moe=MOE), ["it has no experts, and the model does"]),
    ("llama", dict(decoder=dict(num_attention_heads=3, kv_channels=4)), ["hidden_size 8 is no multiple of 3 heads"]),
    ("qwen2", {}, ["add_qkv_bias is False, it takes True"]),
    ("qwen3_moe", {}, ["qk_layernorm is False, it takes True", "it has experts, and the model none"]),
    ("qwen2_moe", dict(moe=BIASED), ["moe_router_score_function is sigmoid, it takes softmax", "without a bias"]),
    ("siglip", {}, ["class_token is True", "patch_bias is False", "pre_layernorm is True"]),
    ("clip", dict(vision=dict(patch_bias=True)), ["vision.patch_bias is True, it takes False"]),
    ("open_clip", dict(vision=dict(final_layernorm=False)), ["vision.final_layernorm is False, it takes True"]),
    ("open_clip", dict(vision=dict(image_resize="pad")), ["image_resize is pad, it takes squash, shorter_side_crop"]),
    ("llava", {}, ["connector is c_abstractor, it takes mlp", "final_layernorm is True", "say which"]),
    ("gpt2", {}, []),
]


@pytest.mark.parametrize(("family", "changes", "reasons"), INEXPRESSIBLE)
def test_a_model_that_a_family_cannot_express_is_refused(
    family: str, changes: dict[str, Any], reasons: list[str]
) -> None:
    model = dataclasses.replace(
        BASE,
        decoder=dataclasses.replace(BASE.decoder, **changes.get("decoder", {})),
        vision=dataclasses.replace(BASE.vision, **changes.get("vision", {})),
        moe=changes.get("moe"),
    )
    with pytest.raises(UserError) as caught:
        export_model(family, model, StateDict({}))
    assert len(faults(caught)) == len(reasons)
    assert all(re.search(reason, str(caught.value)) for reason in reasons)


def test_a_padded_image_is_none_of_open_clips() -> None:
    """Its "longest" resizes before it pads, where ours is LLaVA's: the pixels at the border are others."""
    image = torch.full((3, 30, 60), 250, dtype=torch.uint8)
    theirs = image_transform(
        16, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="longest", fill_color=100
    )(to_pil_image(image))
    ours = square(image, side=16, mode="pad", padding=torch.full((3, 1, 1), 100, dtype=torch.uint8))
    assert (theirs * 255 - ours).abs().max() > 10


def test_a_llava_needs_an_image_token_of_its_vocabulary() -> None:
    vision = VisionConfig(final_layernorm=False)
    model = dataclasses.replace(BASE, vision=vision, connector=ConnectorConfig(connector="mlp"))
    with pytest.raises(UserError, match="its image token 32000 has to be one of the vocabulary of 32000"):
        export_model("llava", model, StateDict({}), image_token_id=32000)


def test_the_vocabulary_is_padded_with_zeros_to_a_multiple_of_128(llama: tuple[dict[str, Any], StateDict]) -> None:
    ours = collect(import_model(*llama, base=BASE)[1])
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        table = ours[f"language_model.{name}"]
        assert table.shape == (256, 48)
        assert table[:200].any(dim=1).all() and not table[200:].any()


class Counting(StateDict):
    """Counts the reads of each tensor."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(state)
        object.__setattr__(self, "reads", [])

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        self.reads.append(name)  # type: ignore[attr-defined]
        return super().read(name, rows)


def test_nothing_is_read_before_it_is_written_and_each_tensor_once(llama: tuple[dict[str, Any], StateDict]) -> None:
    source = Counting(dict(llama[1].state))
    _, plan = import_model(llama[0], source, base=BASE)
    assert not source.reads  # type: ignore[attr-defined]
    collect(plan)
    assert sorted(source.reads) == sorted(source.state)  # type: ignore[attr-defined]


def test_a_plan_says_what_it_makes(llama: tuple[dict[str, Any], StateDict]) -> None:
    model, imported = import_model(*llama, base=BASE)
    _, exported = export_model("llama", model, StateDict(collect(imported)))
    for planned in imported + exported:
        pieces: list[Piece] = list(planned.pieces)
        tensors = [piece.read() for piece in pieces]
        assert [len(tensor) for tensor in tensors] == [piece.num_rows for piece in pieces]
        whole = torch.cat(tensors)
        assert planned.info == TensorInfo(tuple(whole.shape), whole.dtype)
    assert sources(imported)["language_model.decoder.layers.1.mlp.linear_fc1.weight"] == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )


def sources(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {planned.name: planned.sources for planned in plan}
