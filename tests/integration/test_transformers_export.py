"""An exported folder in transformers, in a process without megatron: the same logits and the same tokens as ours."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.checkpoint.transformers_export import export_transformers, import_from_transformers
from megatron_mm1.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    MM1Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.data.chat import Chat
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.requests import Generation, GenerationRequest, Prompt, Score, ScoringRequest
from megatron_mm1.model.mm1 import MM1Model
from tests import transformers_runner
from tests.corpora import encoded, small_tokenizer

CLIP = VisionConfig(
    image_size=32, patch_size=8, num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4
)
SIGLIP = replace(
    CLIP, activation="gelu_tanh", class_token=False, pre_layernorm=False, patch_bias=True, layernorm_epsilon=1e-6
)
LLAVA = replace(CLIP, num_layers=3, feature_layer=-2, final_layernorm=False)
DENSE = DecoderConfig(num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, vocab_size=320)
MOE = MoEConfig(num_moe_experts=4, moe_layer_freq=2, moe_ffn_hidden_size=40)


def connector(name: str, **options: Any) -> ConnectorConfig:
    return ConnectorConfig(
        **{**dict(connector=name, tokens_per_image=4, hidden_size=32, num_layers=1, num_attention_heads=4), **options}
    )


MODELS = {
    "c_abstractor": ModelConfig(vision=CLIP, connector=connector("c_abstractor"), decoder=DENSE),
    "average_pool, SigLIP, tied": ModelConfig(
        vision=SIGLIP,
        connector=connector("average_pool"),
        decoder=replace(DENSE, untie_embeddings_and_output_weights=False),
    ),
    "attention_pool, GQA, QK-norm": ModelConfig(
        vision=replace(CLIP, activation="gelu"),
        connector=connector("attention_pool", tokens_per_image=3),
        decoder=replace(DENSE, num_query_groups=2, qk_layernorm=True, rotary_base=500.0),
    ),
    "mlp, feature layer -2, qkv bias, head dim": ModelConfig(
        vision=LLAVA,
        connector=connector("mlp", tokens_per_image=16),
        decoder=replace(DENSE, add_qkv_bias=True, kv_channels=16, num_query_groups=3, rope_scaling_factor=8.0),
    ),
    "MoE every second block": ModelConfig(vision=CLIP, connector=connector("average_pool"), decoder=DENSE, moe=MOE),
    "MoE pre-softmax, every block": ModelConfig(
        vision=CLIP,
        connector=connector("average_pool"),
        decoder=DENSE,
        moe=replace(MOE, moe_layer_freq=1, moe_router_pre_softmax=True),
    ),
    "MoE sigmoid with expert bias": ModelConfig(
        vision=CLIP,
        connector=connector("c_abstractor"),
        decoder=replace(DENSE, untie_embeddings_and_output_weights=False),
        moe=replace(MOE, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    ),
}

A, B, C = (Image(encoded(size=(20 + 9 * seed, 30), seed=seed)) for seed in range(3))
PROMPTS: list[Prompt] = [
    (Text("the red square and the circle"),),
    (A, Text(" is a red")),
    (Text("a "), A, Text(" of "), B, C, Text("blue square in")),
]


@dataclass
class Exported:
    """One model: ours, its folder, and what transformers made of that."""

    config: MM1Config
    model: MM1Model
    state: dict[str, Tensor]
    engine: Engine
    folder: Path
    theirs: dict[str, Any]


def config_of(model: ModelConfig, tokenizer: Tokenizer) -> MM1Config:
    """Of a run of this model, with the tokenizer's vocabulary."""
    return MM1Config(
        name="exported",
        model=replace(model, decoder=replace(model.decoder, vocab_size=tokenizer.vocab_size)),
        data=DataConfig(tokenizer=str(tokenizer.path), seq_length=128, max_images_per_sequence=4),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32"),
    )


def random_model(config: MM1Config, groups) -> MM1Model:
    """Every tensor random and distinct."""
    model = MM1Model(config, backend="local", pg_collection=groups).eval()
    with torch.no_grad():
        tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "expert_bias" in n)]
        for number, (name, tensor) in enumerate(tensors):
            tensor.normal_(std=0.15, generator=torch.Generator().manual_seed(number))
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1.0)
    return model


def stored(model: MM1Model, groups) -> dict[str, Tensor]:
    """The model's tensors as a checkpoint has them."""
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": True})
    apply_factories(sharded)
    state: dict[str, Tensor] = {}
    for shard in nested_values(sharded):
        if isinstance(shard, ShardedTensor):
            whole = state.setdefault(shard.key, torch.full(shard.global_shape, torch.nan, dtype=shard.dtype))
            whole[shard.global_slice()] = shard.data.detach()
    assert not any(tensor.isnan().any() for tensor in state.values())
    return state


def write(folder: Path, config: MM1Config, state: dict[str, Tensor], *, chat: Chat | None = None) -> None:
    their_config, plan, files = export_transformers(config, StateDict(state), chat=chat)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(their_config))
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    tensors = {name: tensor.contiguous() for name, tensor in collect(plan).items()}
    assert {planned.name: planned.info.shape for planned in plan} == {n: tuple(t.shape) for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def exported(groups, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All models, given to one process of transformers."""
    root = tmp_path_factory.mktemp("exported")
    tokenizer = small_tokenizer(root)
    models, requests = {}, []
    for number, (name, model_config) in enumerate(MODELS.items()):
        config = config_of(model_config, tokenizer)
        model, folder = random_model(config, groups), root / f"model{number}"
        state = stored(model, groups)
        write(folder, config, state)
        engine = Engine(config, model, tokenizer, pg_collection=groups)
        models[name] = Exported(config, model, state, engine, folder, {})
        requests.append(
            {
                "folder": str(folder),
                "text": ["".join("<image>" if isinstance(p, Image) else p.text for p in prompt) for prompt in PROMPTS],
                "images": [[part.data for part in prompt if isinstance(part, Image)] for prompt in PROMPTS],
                "pixel_values": [pixels(config, prompt) for prompt in PROMPTS],
            }
        )
    last = models[name]  # once more in bf16, but for the router's bias, which stays in float32
    half = {key: tensor if "expert_bias" in key else tensor.bfloat16() for key, tensor in last.state.items()}
    models["bf16"] = replace(last, state=half, folder=root / "bf16")
    write(root / "bf16", last.config, half)
    requests.append({**requests[-1], "folder": str(root / "bf16")})
    for model, theirs in zip(models.values(), by_transformers(root, requests), strict=True):
        model.theirs = theirs
    return models


def by_transformers(root: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `tests.transformers_runner` answers, in a process without megatron."""
    torch.save(requests, root / "request")
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, transformers_runner.__file__, str(root / "request"), str(root / "result")]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(root / "result")


@pytest.fixture(params=MODELS)
def case(request, exported: dict[str, Exported]) -> Exported:
    return exported[request.param]


def pixels(config: MM1Config, prompt: Prompt) -> Tensor:
    vision = config.model.vision
    processor = ImageProcessor(vision.image_size, vision.image_mean, vision.image_std)
    return processor([part.data for part in prompt if isinstance(part, Image)])[0]


def ours(case: Exported, prompt: Prompt) -> tuple[list[int], Tensor]:
    """Token ids of a prompt with its images at full length, and the logits of our model for it."""
    tokenizer, per_image = open_tokenizer(case.config.data.tokenizer), case.config.model.connector.tokens_per_image
    ids = [tokenizer.bos_id]
    for part in prompt:
        ids += [tokenizer.image_id] * per_image if isinstance(part, Image) else tokenizer.encode(part.text)
    tokens = torch.tensor([ids])
    slots = (tokens[0] == tokenizer.image_id).nonzero().view(-1, per_image)
    size = case.config.model.vision.image_size
    group = ImageGroup(slots=slots, height=size, width=size, pixels=pixels(case.config, prompt))
    batch = PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        position_ids=torch.arange(len(ids))[None],
        segment_ids=torch.ones_like(tokens, dtype=torch.int32),
        source_ids=torch.zeros_like(tokens),
        images=(group,) if len(slots) else (),
    )
    with torch.no_grad():
        return ids, case.model(batch, return_logits=True)[0]


def test_auto_classes_find_the_folders_own_code(case: Exported) -> None:
    assert case.theirs["class"] == "MM1ForConditionalGeneration"
    assert case.theirs["config"] == "MM1Config"
    assert case.theirs["dtype"] == "torch.float32"


def test_logits_of_0_1_and_3_images_equal_ours(case: Exported) -> None:
    for prompt, logits in zip(PROMPTS, case.theirs["logits"], strict=True):
        torch.testing.assert_close(logits, ours(case, prompt)[1], atol=1e-4, rtol=0)


def test_the_processor_makes_our_ids_and_our_pixels(case: Exported) -> None:
    for prompt, ids, values in zip(PROMPTS, case.theirs["input_ids"], case.theirs["pixel_values"], strict=True):
        assert ids == ours(case, prompt)[0]
        assert (values is None) == (len(pixels(case.config, prompt)) == 0)
        if values is not None:
            torch.testing.assert_close(values, pixels(case.config, prompt), atol=0, rtol=0)


@pytest.mark.parametrize("how", ["generated", "together"])
def test_generates_the_tokens_of_our_engine(case: Exported, how: str) -> None:
    """Each prompt by itself, and all of them padded on the left."""
    new_tokens = transformers_runner.NEW_TOKENS
    requests = [GenerationRequest(prompt=prompt, max_new_tokens=new_tokens) for prompt in PROMPTS]
    expected = [list(one.token_ids) for one in case.engine.generate(requests) if isinstance(one, Generation)]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)  # they depend on the prompt
    assert case.theirs[how] == expected


def test_scores_are_transformers_log_probabilities(case: Exported) -> None:
    """Of the last text of each prompt behind what comes before it."""
    tokenizer = open_tokenizer(case.config.data.tokenizer)
    requests = [
        ScoringRequest(prompt=prompt[:-1], continuation=prompt[-1].text, with_end=False)
        for prompt in PROMPTS
        if isinstance(prompt[-1], Text)
    ]
    assert len(requests) == len(PROMPTS)
    for request, score, logits in zip(requests, case.engine.score(requests), case.theirs["logits"], strict=True):
        ids = tokenizer.encode(request.continuation)
        expected = logits[-len(ids) - 1 : -1].log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        assert isinstance(score, Score)
        torch.testing.assert_close(torch.tensor(score.token_log_likelihoods), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["without_cache", "static_cache"])
def test_the_cache_changes_nothing(case: Exported, how: str) -> None:
    assert case.theirs[how] == [case.theirs["generated"][-1]]


def test_several_samples_of_a_prompt_keep_its_images(case: Exported) -> None:
    assert case.theirs["twice"] == [ids for ids in case.theirs["together"] for _ in range(2)]


def test_prompts_decode_to_their_text(case: Exported) -> None:
    texts = ["".join(part.text for part in prompt if isinstance(part, Text)) for prompt in PROMPTS]
    assert case.theirs["decoded"] == texts


def test_special_names_in_text_are_text(case: Exported) -> None:
    tokenizer = open_tokenizer(case.config.data.tokenizer)
    assert case.theirs["tokenizer"] == tokenizer.encode("the <image> and </s>")


def test_inputs_that_cannot_be_are_refused(exported: dict[str, Exported]) -> None:
    placeholders, blind, no_pixels, no_slots = exported["c_abstractor"].theirs["refused"]
    assert placeholders == "2 placeholders '<image>' in the text, but 1 images"
    assert blind == "this model was trained on text only and sees no images"
    assert no_pixels == "4 image positions in input_ids, but 0 images make 0"
    assert no_slots == "0 image positions in input_ids, but 1 images make 4"


def test_imported_back_it_is_bit_for_bit_what_it_was(case: Exported) -> None:
    source = StateDict(load_file(case.folder / "model.safetensors"))
    model, plan = import_from_transformers(json.loads((case.folder / "config.json").read_text()), source)
    state = collect(plan)
    assert state.keys() == case.state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, case.state[name], atol=0, rtol=0, equal_nan=True)
    again = export_transformers(replace(case.config, model=model), StateDict(state))[0]
    assert again == json.loads((case.folder / "config.json").read_text())


def test_bf16_stays_bf16_and_the_expert_bias_float32(exported: dict[str, Exported]) -> None:
    half = exported["bf16"]
    assert half.theirs["dtype"] == "torch.bfloat16"
    before, after = load_file(half.folder / "model.safetensors"), half.theirs["saved_again"]
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16, torch.float32}


def test_saved_again_by_transformers_it_is_the_same(case: Exported) -> None:
    before = load_file(case.folder / "model.safetensors")
    assert case.theirs["saved_again"].keys() == before.keys()
    for name, tensor in case.theirs["saved_again"].items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)
    source = StateDict(case.theirs["saved_again"])
    import_from_transformers(json.loads(Path(f"{case.folder}-again/config.json").read_text()), source)
