"""The same shapes as a plain torch model, the way a user without this package would write it for speed.

RMSNorm, SwiGLU and RoPE in plain torch, attention by `gpu_peer_attention`, experts by torch's grouped product, a ViT on
scaled_dot_product_attention, all of it compiled. Weights, gradients and moments are bf16, which takes less time than
the float32 ones that this package keeps; the router has no losses.
"""

import torch
from gpu_peer_attention import Attention
from torch import Tensor, nn
from torch.nn import functional

from megatron_mm1.config.derived import (
    expert_ffn_size,
    head_dim,
    is_moe_block,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    padded_vocab_size,
)
from megatron_mm1.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megatron_mm1.data.batch import IGNORE
from megatron_mm1.errors import UserError


class PeerModel(nn.Module):
    """Tower, C-Abstractor and decoder; `forward` returns the summed loss of the trained positions.

    Raises:
        UserError: the model has parts that this one lacks.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        decoder, connector, vision = model.decoder, model.connector, model.vision
        lacking = {
            "connector": connector.connector != "c_abstractor",
            "grouped queries": num_query_groups(decoder) != decoder.num_attention_heads,
            "vision settings": (vision.class_token, vision.pre_layernorm, vision.final_layernorm, vision.patch_bias)
            != (True, True, True, False),
            "tied embeddings": not decoder.untie_embeddings_and_output_weights,
        }
        if any(lacking.values()):
            missing = ", ".join(name for name, is_missing in lacking.items() if is_missing)
            raise UserError(f"the plain torch model cannot be made to match this preset's {missing}")
        self.tower = PeerTower(vision)
        self.connector = PeerAbstractor(model)
        self.decoder = PeerDecoder(model)

    def compile_parts(self) -> None:
        """Compile each block, the connector and the loss: blocks of a kind share their code, which keeps compilation
        to a minute.
        """
        for part in (*self.tower.layers, *self.decoder.layers, self.connector, self.decoder.head):
            part.compile(dynamic=False)

    def forward(
        self, tokens: Tensor, positions: Tensor, labels: Tensor, slots: Tensor, pixels: Tensor, attention: Attention
    ) -> Tensor:
        """tokens, positions and labels: [T]; slots: [N * tokens_per_image]; pixels: [N, 3, H, W]."""
        image_tokens = self.connector(self.tower(pixels)).flatten(0, 1)
        return self.decoder(tokens, positions, labels, slots, image_tokens, attention)


class PeerDecoder(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        decoder = model.decoder
        self.embed_tokens = nn.Embedding(padded_vocab_size(decoder.vocab_size), decoder.hidden_size)
        self.layers = nn.ModuleList(PeerBlock(model, block) for block in range(decoder.num_layers))
        self.head = PeerHead(decoder)
        self.head_dim, self.rotary_base = head_dim(decoder), decoder.rotary_base

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor,
        slots: Tensor,
        image_tokens: Tensor,
        attention: Attention,
    ) -> Tensor:
        """`image_tokens`: [N * tokens_per_image, H], for the positions in `slots`."""
        hidden = self.embed_tokens(tokens).index_copy(0, slots, image_tokens)
        exponents = torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim
        angles = positions[:, None] / self.rotary_base**exponents
        rotation = (angles.cos()[:, None], angles.sin()[:, None])  # [T, 1, head dim / 2]
        for layer in self.layers:
            hidden = layer(hidden, rotation, attention)
        return self.head(hidden, labels)


class PeerHead(nn.Module):
    """Last norm, output layer and summed loss."""

    def __init__(self, decoder: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(decoder.hidden_size, eps=decoder.layernorm_epsilon)
        self.lm_head = nn.Linear(decoder.hidden_size, padded_vocab_size(decoder.vocab_size), bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(hidden)).float()
        return functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


class PeerBlock(nn.Module):
    def __init__(self, model: ModelConfig, block: int) -> None:
        super().__init__()
        decoder = model.decoder
        self.input_layernorm = nn.RMSNorm(decoder.hidden_size, eps=decoder.layernorm_epsilon)
        self.self_attn = PeerAttention(decoder)
        self.post_attention_layernorm = nn.RMSNorm(decoder.hidden_size, eps=decoder.layernorm_epsilon)
        self.mlp = PeerExperts(model) if is_moe_block(model, block) else PeerSwiGLU(decoder)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, attention)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PeerAttention(nn.Module):
    def __init__(self, decoder: DecoderConfig) -> None:
        super().__init__()
        self.heads = decoder.num_attention_heads
        width = self.heads * head_dim(decoder)
        self.qkv_proj = nn.Linear(decoder.hidden_size, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, decoder.hidden_size, bias=False)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        query, key, value = self.qkv_proj(hidden).unflatten(-1, (3, self.heads, -1)).unbind(dim=1)
        return self.o_proj(attention(rotate(query, rotation), rotate(key, rotation), value).flatten(1))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [T, heads, dim]: the first half of each head with the second."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class PeerSwiGLU(nn.Module):
    def __init__(self, decoder: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(decoder.hidden_size, 2 * decoder.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(decoder.ffn_hidden_size, decoder.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class PeerExperts(nn.Module):
    """Softmax over the chosen experts; tokens sorted by expert, and one grouped product for all experts of a layer."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.moe is not None
        experts, hidden, inner = model.moe.num_moe_experts, model.decoder.hidden_size, expert_ffn_size(model)
        self.topk = model.moe.moe_router_topk
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner).normal_(std=0.02))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden).normal_(std=0.02))

    def forward(self, hidden: Tensor) -> Tensor:
        scores, chosen = self.gate(hidden).float().topk(self.topk, dim=-1)  # [T, k]
        weights = scores.softmax(dim=-1).to(hidden.dtype)
        order = chosen.flatten().argsort(stable=True)  # of token-expert pairs, by expert
        experts = torch.arange(len(self.gate_up_proj), device=hidden.device)
        ends = (chosen.flatten()[None] <= experts[:, None]).sum(dim=1, dtype=torch.int32)
        rows = hidden[order // self.topk]
        gate, up = functional.grouped_mm(rows, self.gate_up_proj, offs=ends).chunk(2, dim=-1)
        output = functional.grouped_mm(functional.silu(gate) * up, self.down_proj, offs=ends)
        output = output * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add(0, order // self.topk, output)


class PeerTower(nn.Module):
    """CLIP's vision transformer up to its features."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width, patch = vision.hidden_size, vision.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.position_embedding = nn.Parameter(torch.empty(num_patches(vision) + 1, width).normal_(std=0.02))
        self.pre_layrnorm = nn.LayerNorm(width, eps=vision.layernorm_epsilon)
        self.layers = nn.ModuleList(PeerTowerBlock(vision) for _ in range(num_vision_blocks(vision)))
        self.post_layernorm = nn.LayerNorm(width, eps=vision.layernorm_epsilon)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, patches, C]."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        hidden = self.pre_layrnorm(tokens + self.position_embedding)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.post_layernorm(hidden[:, 1:])


ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class PeerTowerBlock(nn.Module):
    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width = vision.hidden_size
        self.heads, self.activation = vision.num_attention_heads, ACTIVATIONS[vision.activation]
        self.layer_norm1 = nn.LayerNorm(width, eps=vision.layernorm_epsilon)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=vision.layernorm_epsilon)
        self.fc1 = nn.Linear(width, vision.ffn_hidden_size)
        self.fc2 = nn.Linear(vision.ffn_hidden_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.layer_norm1(hidden)).unflatten(-1, (3, self.heads, -1))  # [N, s, 3, heads, dim]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        context = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.out_proj(context.transpose(1, 2).flatten(2))
        return hidden + self.fc2(self.activation(self.fc1(self.layer_norm2(hidden))))


class PeerAbstractor(nn.Module):
    """Honeybee's C-Abstractor: RegNet blocks, pooling, RegNet blocks, two linear layers."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        connector, width = model.connector, model.vision.hidden_size
        inner, hidden, depth = connector.hidden_size, model.decoder.hidden_size, connector.num_layers
        self.grid = round(num_patches(model.vision) ** 0.5)
        self.side = round(connector.tokens_per_image**0.5)
        self.position_embedding = nn.Parameter(torch.empty(num_patches(model.vision), width).normal_(std=0.02))
        self.before = nn.Sequential(*(PeerRegNetBlock(inner if i else width, inner) for i in range(depth)))
        self.after = nn.Sequential(*(PeerRegNetBlock(inner, inner) for _ in range(depth)))
        self.readout = nn.Sequential(nn.Linear(inner, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, features: Tensor) -> Tensor:
        """[N, patches, C] -> [N, tokens_per_image, H]."""
        image = (features + self.position_embedding).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        image = self.after(functional.adaptive_avg_pool2d(self.before(image), self.side))
        return self.readout(image.flatten(2).transpose(1, 2))


class PeerRegNetBlock(nn.Module):
    """1 x 1, depthwise 3 x 3, squeeze-excite and 1 x 1, with a shortcut; each convolution has a norm over channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        squeezed = round(0.25 * channels)
        self.conv1 = PeerConvNorm(channels, width)
        self.conv2 = PeerConvNorm(width, width, kernel_size=3, groups=width)
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)
        self.conv3 = PeerConvNorm(width, width)
        self.shortcut = PeerConvNorm(channels, width) if channels != width else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        inner = functional.silu(self.conv2(functional.silu(self.conv1(image))))
        gate = self.excite(functional.silu(self.squeeze(inner.mean((2, 3))))).sigmoid()
        return functional.silu(self.conv3(inner * gate[:, :, None, None]) + self.shortcut(image))


class PeerConvNorm(nn.Module):
    def __init__(self, channels: int, width: int, *, kernel_size: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.conv(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
