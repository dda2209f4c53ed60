"""Small models of other projects, and what they write to disk."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mm1.checkpoint.tensors import StateDict

DECODER_CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "qwen2_moe": transformers.Qwen2MoeForCausalLM,
    "qwen3_moe": transformers.Qwen3MoeForCausalLM,
}
DECODER = dict(
    vocab_size=200,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=0.02,  # large enough to be seen
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    max_position_embeddings=64,
)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "qwen2_moe": dict(EXPERTS, qkv_bias=False, shared_expert_intermediate_size=0),
    "qwen3_moe": dict(EXPERTS, head_dim=16),
}
TOWER = dict(
    hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
)


def randomize(module: torch.nn.Module, *, seed: int = 0) -> None:
    """Fill every parameter, norms and biases too, with values of its own that neither vanish nor saturate."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        scale = 0.2 if parameter.dim() > 1 else 0.5
        offset = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))


def decoder(family: str, *, seed: int = 0, **settings: Any) -> Any:
    """A random transformers model with an output layer."""
    cls = DECODER_CLASSES[family]
    model = cls(cls.config_class(**{**DECODER, **FAMILY_SETTINGS[family], **settings})).eval()
    randomize(model, seed=seed)
    return model


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], StateDict]:
    """(config.json, tensors) as `save_pretrained` writes them."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), StateDict(load_file(folder / "model.safetensors"))


def load_strictly(cls: Any, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Any:
    """`from_pretrained` on a folder with this config.json and these tensors, none missing and none left over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    assert not problems, problems
    return model.eval()


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit, dtypes and names included."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
