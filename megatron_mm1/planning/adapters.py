"""What low-rank adapters add, from the configuration alone."""

from dataclasses import dataclass

from megatron_mm1.config.derived import head_dim, lora_targets, num_query_groups
from megatron_mm1.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """That of a linear layer with so many inputs and outputs; ranks share the outputs of a column-parallel one, and the
    inputs of others.
    """

    rank: int
    inputs: int
    outputs: int
    is_column: bool

    def parameters(self, size: int = 1) -> int:
        """On each of `size` tensor-parallel ranks."""
        inputs, outputs = (self.inputs, self.outputs // size) if self.is_column else (self.inputs // size, self.outputs)
        return self.rank * (inputs + outputs)

    def inputs_on(self, size: int) -> int:
        """Inputs that each of `size` tensor-parallel ranks sees of a position."""
        return self.inputs if self.is_column else self.inputs // size


def layer_adapters(model: ModelConfig, layer: str) -> list[Adapter]:
    """Of a decoder layer: `*` attention, `-` feed-forward, `E` experts, which have none."""
    decoder = model.decoder
    query, key_value = (heads * head_dim(decoder) for heads in (decoder.num_attention_heads, num_query_groups(decoder)))
    hidden, ffn = decoder.hidden_size, decoder.ffn_hidden_size
    shapes = {
        "*": {"linear_qkv": (hidden, query + 2 * key_value), "linear_proj": (query, hidden)},
        "-": {"linear_fc1": (hidden, 2 * ffn), "linear_fc2": (ffn, hidden)},
        "E": {},
    }
    return _adapters(model, "decoder", shapes[layer])


def tower_block_adapters(model: ModelConfig) -> list[Adapter]:
    """Of a block of the built-in tower."""
    width, ffn = model.vision.hidden_size, model.vision.ffn_hidden_size
    shapes = {
        "linear_qkv": (width, 3 * width),
        "linear_proj": (width, width),
        "linear_fc1": (width, ffn),
        "linear_fc2": (ffn, width),
    }
    return _adapters(model, "tower", shapes)


def _adapters(model: ModelConfig, component: str, shapes: dict[str, tuple[int, int]]) -> list[Adapter]:
    targets = lora_targets(model.lora, component)
    return [
        Adapter(rank=model.lora.rank, inputs=inputs, outputs=outputs, is_column=name in ("linear_qkv", "linear_fc1"))
        for name, (inputs, outputs) in shapes.items()
        if model.lora is not None and name in targets
    ]
