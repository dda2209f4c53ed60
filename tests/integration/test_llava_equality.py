"""The whole model against one that is not ours: transformers' LLaVA with the same weights gives the same logits."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from megatron_mm1.checkpoint.families import export_model, import_model
from megatron_mm1.checkpoint.local_state import local_state_dict
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config.schema import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_mm1.model.mm1 import MM1Model
from tests import pretrained
from tests.llava import (
    IMAGE_ID,
    VOCABULARY,
    llava_logits,
    llava_model,
    load_llava,
    mm1_config,
    packed,
    sample,
)


@pytest.fixture(scope="module")
def llava():
    return llava_model(vocab_size=VOCABULARY).eval()


@pytest.fixture(scope="module")
def mm1(llava, groups):
    config = mm1_config(vocab_size=VOCABULARY)
    model = MM1Model(config, backend="local", pg_collection=groups).eval()
    load_llava(model, llava.state_dict(), config)
    return model


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_logits_equal_transformers(llava, mm1, num_images):
    tokens, pixels = sample(num_images)
    with torch.no_grad():
        logits = mm1(packed([(tokens, pixels)], seq_length=len(tokens)), return_logits=True)[0, :, :VOCABULARY]
    torch.testing.assert_close(logits, llava_logits(llava, tokens, pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_examples_do_not_see_each_other(llava, mm1, rows):
    """Three samples packed together, padded at the end, give what transformers gives for each alone."""
    samples = [sample(1, length=40), sample(0, length=30), sample(3), sample(1, length=50)]
    batch = packed(samples, seq_length=200, rows=rows)
    with torch.no_grad():
        logits = mm1(batch, return_logits=True)
    per_row = len(samples) // rows
    for number, (tokens, pixels) in enumerate(samples):
        row, place = divmod(number, per_row)
        ours = logits[row][batch.segment_ids[row] == place + 1][:, :VOCABULARY]
        torch.testing.assert_close(ours, llava_logits(llava, tokens, pixels), atol=1e-4, rtol=0)


CLIP = CLIPVisionConfig(**pretrained.TOWER | {"image_size": 32, "patch_size": 8})
SIGLIP = SiglipVisionConfig(**pretrained.TOWER | {"image_size": 32, "patch_size": 8, "vision_use_head": False})
TEXT = pretrained.DECODER | {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
WHOLE = {
    "clip, llama": (CLIP, LlamaConfig(**TEXT), {}),
    "the last block": (CLIP, LlamaConfig(**TEXT), dict(vision_feature_layer=-1)),
    "tied": (CLIP, LlamaConfig(**TEXT, tie_word_embeddings=True), dict(tie_word_embeddings=True)),
    "mistral": (CLIP, MistralConfig(**TEXT, sliding_window=None), {}),
    "siglip, qwen2": (SIGLIP, Qwen2Config(**TEXT), dict(vision_feature_select_strategy="full")),
    "qwen3": (CLIP, Qwen3Config(**TEXT, head_dim=16), {}),
    "qwen2_moe": (CLIP, Qwen2MoeConfig(**TEXT, **pretrained.FAMILY_SETTINGS["qwen2_moe"]), {}),
}
BASE = ModelConfig(
    decoder=DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1),
    vision=VisionConfig(feature_layer=-4),
    connector=ConnectorConfig(options={"a": 1}),
)


@pytest.mark.parametrize("case", WHOLE)
def test_a_llava_from_disk_and_back(case, groups, tmp_path):
    """Logits with 0, 1 and 3 images; back, every tensor that is read is the same, and so are the logits."""
    vision, text, settings = WHOLE[case]
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, **settings)
    ).eval()
    pretrained.randomize(llava)
    samples = [sample(number) for number in (0, 1, 3)]
    expected = [llava_logits(llava, *one) for one in samples]
    config, source = pretrained.saved(llava, tmp_path / "theirs")

    imported, plan = import_model(config, source, base=BASE)
    ours = collect(plan)
    mm1 = MM1Model(replace(mm1_config(vocab_size=VOCABULARY), model=imported), backend="local", pg_collection=groups)
    missing, unexpected = mm1.load_state_dict(local_state_dict(ours), strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("_extra_state")]
    for (tokens, pixels), logits in zip(samples, expected, strict=True):
        with torch.no_grad():
            batch = packed([(tokens, pixels)], seq_length=len(tokens))
            result = mm1.eval()(batch, return_logits=True)[0, :, :VOCABULARY]
        assert (result - logits).abs().max() <= 1e-4

    exported, plan = export_model("llava", imported, StateDict(ours), seq_length=256, image_token_id=IMAGE_ID)
    again = pretrained.load_strictly(LlavaForConditionalGeneration, exported, collect(plan), tmp_path / "exported")
    before, after = llava.state_dict(), again.state_dict()
    unread = ["post_layernorm", "shared_expert"]
    if exported["vision_config"]["num_hidden_layers"] == 2:
        unread.append("vision_tower.encoder.layers.2.")
    kept = {name for name in before if not any(part in name for part in unread)}
    assert kept == {name for name in after if not any(part in name for part in unread)}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(torch.equal(llava_logits(again, *one), logits) for one, logits in zip(samples, expected, strict=True))


@pytest.mark.parametrize("names", ["memory", "disk", "transformers 4"])
def test_a_llava_by_its_names_in_every_version(names, llava, tmp_path):
    in_memory = llava.state_dict()
    config, on_disk = pretrained.saved(llava, tmp_path)
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in on_disk.state.items()}
    state = {"memory": in_memory, "disk": on_disk.state, "transformers 4": old}[names]
    if names != "memory":
        assert state.keys() & in_memory.keys() == set()
    _, expected = import_model(config, StateDict(in_memory), base=BASE)
    _, plan = import_model(config, StateDict(state), base=BASE)
    pretrained.assert_same_tensors(collect(plan), collect(expected))
