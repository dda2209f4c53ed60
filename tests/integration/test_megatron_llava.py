"""megatron-core's LLaVAModel, saved by megatron-core, gives the same logits as the MM1 made of its checkpoint."""

import dataclasses

import pytest
import torch

from megatron_mm1.checkpoint.megatron_llava import import_megatron_llava
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config import MM1Config, OptimizerConfig, TrainingConfig
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.mm1 import MM1Model
from tests.canonical import canonical_state, load_canonical
from tests.megatron_llava import (
    BASE,
    HIDDEN,
    IMAGE,
    PER_IMAGE,
    VOCABULARY,
    build_llava,
    read_distributed,
    save_llava,
)

MODELS = {
    "CLIP": dict(),
    "SigLIP": dict(tower="siglip"),
    "InternViT's embeddings": dict(tower="internvit"),
    "Transformer Engine's names": dict(fused_norm_names=True),
    "QK-norm, qkv bias": dict(fused_norm_names=True, qk_layernorm=True, language=dict(add_qkv_bias=True)),
    "one group per head, head dim": dict(language=dict(num_query_groups=6, kv_channels=16)),
    "tied": dict(share_embeddings_and_output_weights=True),
    "no bias in the projection": dict(projection=dict(add_bias_linear=False)),
}


def as_mm1(source, groups, *, base=BASE) -> MM1Model:
    """The MM1 that a checkpoint becomes, loaded with what is planned for each of its tensors."""
    model_config, plan = import_megatron_llava(source, base=base)
    config = MM1Config(
        name="imported",
        model=model_config,
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32"),
    )
    model = MM1Model(config, backend="local", pg_collection=groups).eval()
    tensors = collect(plan)
    expected = canonical_state(model, groups)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    load_canonical(model, tensors, groups)
    return model


def prompt(*parts: int) -> torch.Tensor:
    """Token ids, `parts` of text with an image between each and the next."""
    generator = torch.Generator().manual_seed(len(parts))
    texts = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in parts]
    image = torch.tensor([IMAGE])
    return torch.cat([piece for text in texts for piece in (text, image)][:-1])


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def llava_logits(llava, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits, _ = llava(images, ids[None], torch.arange(len(ids))[None], None)
    return logits[0]


def mm1_logits(mm1: MM1Model, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Of the same prompt: an image's id stands for as many positions as it has tokens."""
    tokens = ids.repeat_interleave(torch.where(ids == IMAGE, PER_IMAGE, 1))
    slots = (tokens == IMAGE).nonzero().view(-1, PER_IMAGE)
    tokens = tokens.clamp(min=0)[None]
    groups = (ImageGroup(slots=slots, height=32, width=32, pixels=images),) if len(images) else ()
    ones, positions = torch.ones_like(tokens), torch.arange(tokens.numel())[None]
    batch = PackedBatch(tokens, torch.full_like(tokens, IGNORE), positions, ones.int(), ones, groups)
    with torch.no_grad():
        return mm1(batch, return_logits=True)[0, :, :VOCABULARY]


PROMPTS = {"text only": prompt(12), "one image": prompt(5, 9), "three images": prompt(0, 4, 1, 6)}


def assert_equal_logits(llava, mm1) -> None:
    for ids in PROMPTS.values():
        images = pixels(int((ids == IMAGE).sum()))
        theirs = llava_logits(llava, ids, images)
        assert theirs.std() > 0.1
        torch.testing.assert_close(mm1_logits(mm1, ids, images), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("numbered_layers", [False, True], ids=["layers stacked", "layers numbered"])
def test_logits_equal_megatron_cores(groups, tmp_path, numbered_layers):
    llava = build_llava(groups)
    folder = save_llava(llava, tmp_path / "llava", groups, numbered_layers=numbered_layers)
    assert_equal_logits(llava, as_mm1(read_distributed(folder), groups))


@pytest.mark.parametrize("case", MODELS)
def test_logits_equal_megatron_cores_of_every_kind(groups, case):
    llava = build_llava(groups, **MODELS[case])
    assert_equal_logits(llava, as_mm1(source_of(llava, groups), groups))


def source_of(llava, groups) -> StateDict:
    return StateDict(canonical_state(llava, groups))


FOREIGN = {
    "wide projection": (dict(projection=dict(ffn_hidden_size=64)), ["linear_fc1.weight has shape (64, 32)"]),
    "affine projection": (dict(vision_projection_type="affine"), ["it has an affine projection"]),
    "pixel shuffle": (dict(pixel_shuffle=True), ["has shape (48, 128)", "pixel shuffle"]),
    "biases, no gate, LayerNorm": (
        dict(language=dict(add_bias_linear=True, gated_linear_unit=False, normalization="LayerNorm")),
        [
            "biases in the decoder",
            "LayerNorm in the decoder",
            "layers.*.mlp.linear_fc1.weight has shape (96, 48), an MM1 needs (192, 48) (in 2 layers)",
            "layers.*.mlp.linear_fc2.bias has no place in an MM1 (in 2 layers)",
            "decoder.final_layernorm.bias has no place",
        ],
    ),
    "learned positions": (dict(language_position_embedding_type="learned_absolute"), ["learned positions"]),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_an_mm1_has_no_place_for_is_named(groups, case):
    settings, reasons = FOREIGN[case]
    source = source_of(build_llava(groups, **settings), groups)
    with pytest.raises(UserError) as error:
        import_megatron_llava(source, base=BASE)
    for reason in reasons:
        assert reason in str(error.value)


@pytest.fixture(scope="module")
def source(groups):
    return source_of(build_llava(groups), groups)


def test_every_missing_misshapen_and_surplus_tensor_is_named(source):
    state = dict(source.state)
    del state["vision_model.ln_pre.bias"], state["language_model.decoder.layers.1.mlp.linear_fc1.weight"]
    state["vision_model.class_token"] = torch.ones(1, 2, 32)
    state["vision_model.mask_token"] = torch.ones(1)
    with pytest.raises(UserError) as error:
        import_megatron_llava(StateDict(state), base=BASE)
    for fault in (
        "vision_model.ln_pre.bias is missing",
        "language_model.decoder.layers.*.mlp.linear_fc1.weight is missing",
        "vision_model.class_token has shape (1, 2, 32), an MM1 needs (1, 1, 32)",
        "vision_model.mask_token has no place",
    ):
        assert fault in str(error.value)
    assert str(error.value).count("\n  - ") == 4


def with_decoder(**settings):
    return dataclasses.replace(BASE, decoder=dataclasses.replace(BASE.decoder, **settings))


HEADS = {
    "no divisor": (with_decoder(num_attention_heads=5), "num_attention_heads 5 does not go with"),
    "more than rows": (with_decoder(num_attention_heads=96), "num_attention_heads 96 does not go with"),
    "other groups": (
        with_decoder(num_attention_heads=24, num_query_groups=2),
        "num_attention_heads 24 and the shapes make num_query_groups 8, not 2",
    ),
    "other head dim": (
        with_decoder(num_attention_heads=24, kv_channels=8),
        "num_attention_heads 24 and the shapes make kv_channels 2, not 8",
    ),
    "of the tower": (
        dataclasses.replace(BASE, vision=dataclasses.replace(BASE.vision, num_attention_heads=5)),
        "vision.hidden_size 32 is not divisible by vision.num_attention_heads 5",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_other_heads_are_refused(source, case):
    base, reason = HEADS[case]
    with pytest.raises(ConfigError, match=reason):
        import_megatron_llava(source, base=base)


ALTERED = {
    "another model": (
        lambda state: {"tower.class_token": torch.ones(4)},
        r"no LLaVAModel .*: without vision_model.conv1",
    ),
    "no convolution": (
        lambda state: {**state, "vision_model.conv1.weight": torch.ones(32, 192)},
        r"without vision_model.conv1.weight$",
    ),
    "patches in no square": (
        lambda state: {**state, "vision_model.position_embeddings.weight": torch.ones(19, 32)},
        "18 positions for patches, which are no square",
    ),
    "experts": (
        lambda state: {**state, "language_model.decoder.layers.mlp.router.weight": torch.ones(2, 4, 48)},
        "experts in the decoder",
    ),
}


@pytest.mark.parametrize("case", ALTERED)
def test_weights_of_something_else_are_refused(source, case):
    alter, reason = ALTERED[case]
    with pytest.raises(UserError, match=reason):
        import_megatron_llava(StateDict(alter(source.state)), base=BASE)


def test_a_training_checkpoints_optimizer_state_is_left(source):
    state = {**source.state, "optimizer.state.exp_avg.vision_model.class_token": torch.ones(1, 1, 32)}
    _, plan = import_megatron_llava(StateDict(state), base=BASE)
    assert not [planned.name for planned in plan if "exp_avg" in planned.name]


def test_dtypes_stay_and_the_vocabulary_is_padded(source):
    state = {name: tensor.bfloat16() for name, tensor in source.state.items()}
    model, plan = import_megatron_llava(StateDict(state), base=BASE)
    tensors = collect(plan)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert model.decoder.vocab_size == VOCABULARY
    assert tensors["language_model.output_layer.weight"].shape == (256, HIDDEN)
    assert not tensors["language_model.output_layer.weight"][VOCABULARY:].any()
