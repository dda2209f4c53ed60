"""What an exported folder is made of: configuration, tokenizer, pixels, tensors and what cannot be exported."""

import io
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import PIL.Image
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.checkpoint.transformers_export import (
    _generation_config,
    export_transformers,
    import_from_transformers,
)
from megatron_mm1.checkpoint.transformers_export.configuration import from_transformers, to_transformers
from megatron_mm1.checkpoint.transformers_export.correspondence import mm1_correspondence
from megatron_mm1.checkpoint.transformers_export.files.image_processing_mm1 import MM1ImageProcessor
from megatron_mm1.checkpoint.transformers_export.tokenizer import tokenizer_files
from megatron_mm1.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    MM1Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    VisionConfig,
)
from megatron_mm1.data.chat import OWN_TEMPLATE, Chat
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.tokenizer import IMAGE_SYMBOL, Tokenizer, open_tokenizer, train_tokenizer
from megatron_mm1.errors import UserError
from tests.corpora import encoded, small_tokenizer

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=16, patch_size=8, num_layers=1, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2
    ),
    connector=ConnectorConfig(connector="average_pool", tokens_per_image=4),
    decoder=DecoderConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=320
    ),
    moe=MoEConfig(num_moe_experts=3, moe_layer_freq=2),
)
SPECIAL = {"image_token_id": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return small_tokenizer(folder)


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> MM1Config:
    data = DataConfig(tokenizer=str(tokenizer.path), seq_length=64)
    return MM1Config(name="small", model=MODEL, data=data, optimizer=OptimizerConfig(lr=1e-3))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rules = mm1_correspondence(MODEL, vocab_rows=384).rules
    return {rule.ours: torch.randn(rule.our_shape, generator=generator) for rule in rules}


def another(value: Any, hint: Any) -> Any:
    """Some other value of a field."""
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if choices:
        return next(choice for choice in choices if choice != value)
    match value:
        case bool():
            return not value
        case tuple():
            return tuple(element + 0.25 for element in value)
        case None:
            return 8
        case _:
            return value + 3


def all_changed(part: Any, **kept: Any) -> Any:
    """A configuration with no field as it was, but for those in `kept`."""
    hints = get_type_hints(type(part))
    values = {
        field.name: another(getattr(part, field.name), hints[field.name])
        for field in fields(part)
        if field.name not in kept
    }
    return replace(part, **{**values, **kept})


def test_every_field_of_a_model_comes_back_from_config_json() -> None:
    assert MODEL.moe is not None
    model = ModelConfig(
        vision=all_changed(MODEL.vision, tower="vit"),
        connector=all_changed(MODEL.connector, connector="c_abstractor", options={}),
        decoder=all_changed(MODEL.decoder),
        moe=all_changed(MODEL.moe, moe_router_score_function="softmax"),
    )
    for changed in (model, replace(model, moe=replace(model.moe, moe_router_pre_softmax=False))):
        theirs = to_transformers(changed, vocab_rows=640, seq_length=64, special_ids=SPECIAL, dtype="bfloat16")
        assert from_transformers(json.loads(json.dumps(theirs))) == (changed, 640)


def test_a_sigmoid_router_comes_back() -> None:
    assert MODEL.moe is not None
    decoder = replace(MODEL.decoder, kv_channels=4)
    moe = replace(MODEL.moe, moe_ffn_hidden_size=24, moe_router_score_function="sigmoid")
    for topk in (1, 2):
        model = replace(MODEL, decoder=decoder, moe=replace(moe, moe_router_topk=topk))
        theirs = to_transformers(model, vocab_rows=384, seq_length=64, special_ids=SPECIAL, dtype="float32")
        assert theirs["text_config"]["norm_topk_prob"] == (topk > 1)  # alone, a score is not made 1
        assert from_transformers(theirs)[0] == model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"text_config": {}}, "config.json is not one of an exported MM1: KeyError"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "'yarn'.*supported are default, and llama3"),
    ],
)
def test_another_config_json_is_refused(change: dict[str, Any], says: str) -> None:
    theirs = to_transformers(MODEL, vocab_rows=384, seq_length=64, special_ids=SPECIAL, dtype="float32")
    if change.get("text_config"):
        change = {"text_config": {**theirs["text_config"], **change["text_config"]}}
    with pytest.raises(UserError, match=says):
        from_transformers({**theirs, **change})


def test_a_plan_reads_one_expert_at_a_time(config: MM1Config, state: dict[str, torch.Tensor]) -> None:
    _, plan, _ = export_transformers(config, StateDict(state))
    experts = [planned for planned in plan if ".experts." in planned.name]
    assert len(experts) == 3 * 3
    stacked = state["language_model.decoder.layers.3.mlp.experts.experts.linear_fc1.weight"]
    assert {planned.name: planned.pieces[0].read() for planned in experts}[
        "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    ].equal(stacked[2, 24:])


def test_rows_that_are_no_piece_are_exported_and_never_generated(
    config: MM1Config, state: dict[str, torch.Tensor]
) -> None:
    theirs, plan, files = export_transformers(config, StateDict(state))
    assert theirs["text_config"]["vocab_size"] == 384
    exported = collect(plan)["lm_head.weight"]
    assert exported.equal(state["language_model.output_layer.weight"])
    assert set(json.loads(files["generation_config.json"])["suppress_tokens"]) == {0, 1, 4, *range(320, 384)}


@pytest.mark.parametrize("text_only", [False, True])
def test_the_processor_takes_images_if_training_did(config: MM1Config, state, text_only: bool) -> None:
    trained = replace(config, data=replace(config.data, text_only=text_only))
    files = export_transformers(trained, StateDict(state))[2]
    assert json.loads(files["processor_config.json"])["takes_images"] is not text_only


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_parts_of_the_users_own_are_refused(config: MM1Config, part: str) -> None:
    field = {"vision": "tower", "connector": "connector"}[part]
    own = replace(getattr(MODEL, part), **{field: "mine.Part"})
    with pytest.raises(UserError, match=r"cannot export .* 'mine.Part' to transformers: .* built-in"):
        export_transformers(replace(config, model=replace(MODEL, **{part: own})), StateDict({}))


def test_missing_extra_and_misshaped_tensors_are_all_named(config: MM1Config, state: dict[str, torch.Tensor]) -> None:
    wrong = {name: tensor for name, tensor in state.items() if name != "tower.class_token"}
    wrong["connector.projection.bias"] = torch.zeros(3)
    wrong["language_model.more"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        export_transformers(config, StateDict(wrong))
    assert all(
        name in str(error.value) for name in ("tower.class_token", "connector.projection.bias", "language_model.more")
    )
    theirs, plan, _ = export_transformers(config, StateDict(state))
    tensors = collect(plan)
    del tensors["model.language_model.norm.weight"]
    with pytest.raises(UserError, match=r"missing: model\.language_model\.norm\.weight \[16\]"):
        import_from_transformers(theirs, StateDict(tensors))


def test_the_folders_code_imports_nothing_of_ours(config: MM1Config, state) -> None:
    files = export_transformers(config, StateDict(state))[2]
    code = {name: text for name, text in files.items() if name.endswith(".py")}
    assert set(code) >= {"modeling_mm1.py", "image_processing_mm1.py", "geometry_mm1.py", "tiling_mm1.py"}
    for name, text in code.items():
        assert not re.search(r"^\s*(from|import) (megatron|tests)", text, re.MULTILINE), name


def test_a_tokenizer_with_more_pieces_than_embeddings_is_refused(config: MM1Config, state) -> None:
    small = {name: tensor[:128] if len(tensor) == 384 else tensor for name, tensor in state.items()}
    with pytest.raises(UserError, match="has 320 pieces, but the model only 128 embeddings"):
        export_transformers(config, StateDict(small))


# Tokenizer


def fast(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    loaded = tokenizers.Tokenizer.from_str(tokenizer_files(tokenizer, max_length=64)["tokenizer.json"])
    loaded.encode_special_tokens = True  # tokenizer_config.json has it
    return loaded


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return tokenizer, fast(tokenizer)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Pieces that overlap themselves, which can be put together in several ways."""
    path = tmp_path_factory.mktemp("repetitive") / "tokenizer.model"
    words = ["abababab", "aaaa", "aaaaaaa", "ab", "ba", "aba", "bab", "abb", "    ", "----", "====", "abaab"]
    train_tokenizer([" ".join(words), " ".join(reversed(words))] * 40, path, vocab_size=310)
    return open_tokenizer(path), fast(open_tokenizer(path))


def assert_same(pair: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "\n\n a\tb\r\n red\n",
        "12345",
        "naïve café red",
        "日本語 😀👨‍👩‍👧",
        "\x00\x7f\u200b\ufeff",
        "ﬁ ½ Å",
        "\U0010ffff",
        "\u2581red\u2581",
        "<s></s><pad><unk><image>",
        "<0x41>",
    ],
)
def test_tokenizer_json_gives_our_ids(pair, text: str) -> None:
    assert_same(pair, text)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_gives_our_ids(pair, text: str) -> None:
    assert_same(pair, text)


@settings(deadline=None)
@given(text=st.text(st.sampled_from("redgnblu aoqsctiw \n"), max_size=60))
def test_text_like_the_corpus_gives_our_ids(pair, text: str) -> None:
    assert_same(pair, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("aab b-= "), max_size=40))
def test_pieces_with_several_ways_of_making_them_give_our_ids(repetitive, text: str) -> None:
    assert_same(repetitive, text)


def test_the_beginning_of_text_is_put_first(pair) -> None:
    ours, theirs = pair
    assert theirs.encode("red square").ids == [ours.bos_id, *ours.encode("red square")]


@pytest.mark.demo
@pytest.mark.parametrize("file", ["text/validation/glosses.txt", "interleaved/validation/documents.jsonl"])
def test_the_demo_corpus_gives_our_ids(demo_corpus: Path, file: str) -> None:
    ours = open_tokenizer(demo_corpus / "tokenizer.model")
    text = (demo_corpus / "raw" / file).read_text()
    assert_same((ours, fast(ours)), text)


def test_a_tokenizer_json_is_exported_as_it_is(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["red green blue square"] * 20,
        tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens(["<|endoftext|>", "<|image_pad|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}')
    ours = open_tokenizer(tmp_path / "tokenizer.json")
    exported = tmp_path / "exported"
    exported.mkdir()
    for name, content in tokenizer_files(ours, max_length=64).items():
        (exported / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert (exported / "tokenizer.json").read_bytes() == ours.path.read_bytes()
    theirs = AutoTokenizer.from_pretrained(exported)
    for text in ("red square", "a <|image_pad|> <|endoftext|>", "naïve café 😀"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.image_token == "<|image_pad|>"
    assert open_tokenizer(exported / "tokenizer.json").fingerprint == ours.fingerprint


def test_a_model_of_conversations_ends_an_answer_with_the_turn(config: MM1Config, state, tokenizer: Tokenizer) -> None:
    files = export_transformers(config, StateDict(state), chat=Chat())[2]
    assert files["chat_template.jinja"] == OWN_TEMPLATE
    made = json.loads(files["generation_config.json"])
    assert made["eos_token_id"] == [tokenizer.control_id("<|end|>"), tokenizer.eos_id]
    assert not set(made["eos_token_id"]) & set(made["suppress_tokens"])
    assert "chat_template.jinja" not in export_transformers(config, StateDict(state))[2]


def test_an_end_of_text_that_also_pads_can_be_generated() -> None:
    ids = {"image_token_id": 5, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 2}
    made = json.loads(_generation_config(ids, [2], 6, vocab_rows=8))
    assert (made["suppress_tokens"], made["eos_token_id"]) == ([5, 6, 7], 2)


def test_the_end_of_a_turn_that_also_pads_can_be_generated() -> None:
    ids = {"image_token_id": 5, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 4}
    made = json.loads(_generation_config(ids, [4, 3], 6, vocab_rows=8))
    assert (made["suppress_tokens"], made["eos_token_id"]) == ([5, 2, 6, 7], [4, 3])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(model_type="unigram"), "it is no byte-pair encoding"),
        (dict(byte_fallback=False), "it has no byte fallback"),
        (dict(normalization_rule_name="nmt_nfkc"), r"it normalises text \(nmt_nfkc\)"),
        (dict(add_dummy_prefix=True), "it puts a space before the text"),
        (dict(remove_extra_whitespaces=True), "it removes spaces"),
        (dict(user_defined_symbols=["red"]), "user-defined pieces of several characters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    ours = dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    with (tmp_path / "other.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["red green blue"] * 10),
            model_writer=model,
            control_symbols=[IMAGE_SYMBOL],
            hard_vocab_limit=False,
            vocab_size=280,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
            **{**ours, **options},
        )
    with pytest.raises(UserError, match=says):
        tokenizer_files(open_tokenizer(tmp_path / "other.model"), max_length=64)


# Pixels


def noisy(format: str, *, mode: str = "RGB", **options: Any) -> bytes:
    """A picture of noise, which shows any difference between decoders."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    content = io.BytesIO()
    PIL.Image.fromarray(noise).convert(mode).save(content, format, **options)
    return content.getvalue()


TURNED = PIL.Image.Exif()
TURNED[0x0112] = 6
PICTURES = {
    "PNG": noisy("PNG"),
    "grey PNG": noisy("PNG", mode="L"),
    "PNG with transparency": noisy("PNG", mode="RGBA"),
    "GIF": encoded("GIF", size=(40, 30)),
    "JPEG 4:2:0": noisy("JPEG", quality=80, subsampling=2),
    "JPEG 4:4:4": noisy("JPEG", quality=95, subsampling=0),
    "CMYK JPEG": noisy("JPEG", mode="CMYK"),
    "turned JPEG": noisy("JPEG", exif=TURNED),
    "WebP": noisy("WEBP", quality=80),
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_pixels_equal_ours(picture: bytes) -> None:
    """Resizing is the same code; decoders of lossy formats may differ by 2 of 255, here they do not."""
    vision = VisionConfig()
    ours = ImageProcessor(48, vision.image_mean, vision.image_std)([picture])[0]
    theirs = MM1ImageProcessor(image_size=48, image_mean=vision.image_mean, image_std=vision.image_std)
    made = theirs(PIL.Image.open(io.BytesIO(picture)))["pixel_values"]
    difference = (made - ours).abs() * 255 * torch.tensor(vision.image_std).view(1, 3, 1, 1)
    assert difference.max() <= 2.01


def test_an_image_may_be_an_array() -> None:
    picture = PIL.Image.open(io.BytesIO(PICTURES["PNG"]))
    theirs = MM1ImageProcessor(image_size=48)
    assert theirs(np.asarray(picture))["pixel_values"].equal(theirs([picture])["pixel_values"])
    with pytest.raises(TypeError, match="no options do_resize"):
        theirs(picture, do_resize=False)
