"""Named configurations: the paper's sizes, the grid of its learning-rate law, LLaVA-1.5, and ours for two CPU cores.

[P] quoted from the paper, [M] widely reported, [C] our choice where the paper is silent (docs/facts.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from megatron_mm1.config import llava15
from megatron_mm1.config.choice import chosen
from megatron_mm1.config.laws import law_parameters, peak_learning_rate, swiglu_ffn_size
from megatron_mm1.config.schema import (
    CheckpointConfig,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    LoggingConfig,
    MM1Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TrainingConfig,
    VisionConfig,
)

CONNECTOR_LR = 8e-5  # [M] at every size

VIT_H_14_378 = VisionConfig()  # [P] the final tower
VIT_L_14_336 = VisionConfig(  # [P] the ablations' tower
    image_size=336, patch_size=14, num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16
)

DECODER_3B = DecoderConfig(num_layers=26, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24)  # [C]
DECODER_7B = DecoderConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)  # [C]
DECODER_30B = DecoderConfig(num_layers=48, hidden_size=7168, ffn_hidden_size=19456, num_attention_heads=56)  # [C]
LLAMA_13B = DecoderConfig(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)

MOE_3B = MoEConfig(num_moe_experts=64, moe_layer_freq=2)  # [P]
MOE_7B = MoEConfig(
    num_moe_experts=32, moe_layer_freq=4, moe_ffn_hidden_size=13184
)  # [P]; [C] width, for 47B in all [P]


MIXTURE = {"captions": 0.45, "interleaved": 0.45, "text": 0.10}  # [P]


def paper_sources(mixture: Mapping[str, float]) -> tuple[SourceConfig, ...]:
    """The paper's kinds of data with these weights; the paths are for the user to replace."""
    return tuple(SourceConfig(name=name, path=f"data/{name}", weight=weight) for name, weight in mixture.items())


def _mm1(
    name: str,
    *,
    decoder: DecoderConfig,
    lr: float,
    vision: VisionConfig = VIT_H_14_378,
    moe: MoEConfig | None = None,
    output_z_loss_coeff: float = 0.0,
) -> MM1Config:
    """MM1's recipe (the schema's defaults) around a decoder; mixture-of-experts models keep the dense one's [P]."""
    return MM1Config(
        name=name,
        model=ModelConfig(decoder=decoder, vision=vision, moe=moe),
        optimizer=OptimizerConfig(lr=lr, connector_lr=CONNECTOR_LR),
        training=TrainingConfig(output_z_loss_coeff=output_z_loss_coeff),
        data=DataConfig(tokenizer="data/tokenizer.model", sources=paper_sources(MIXTURE)),
        run_dir=f"runs/{name}",
    )


def _law_grid(name: str, *, num_layers: int, hidden_size: int) -> MM1Config:
    """A model of the grid that the learning-rate law was fitted on: sizes [P], shapes [C]."""
    decoder = DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=swiglu_ffn_size(hidden_size),
        num_attention_heads=hidden_size // 64,
    )
    lr = peak_learning_rate(law_parameters(num_layers, hidden_size))
    return _mm1(name, decoder=decoder, lr=float(f"{lr:.3g}"), vision=VIT_L_14_336)


def _llava15(name: str, *, decoder: DecoderConfig) -> MM1Config:
    """LLaVA-1.5 around a Llama, to import its parts into; the recipes llava15-align and llava15-sft train it [M]."""
    return MM1Config(
        name=name,
        model=ModelConfig(
            decoder=decoder,
            vision=replace(VIT_L_14_336, feature_layer=-2, final_layernorm=False, image_resize="shorter_side_crop"),
            connector=ConnectorConfig(connector="mlp", tokens_per_image=576),
        ),
        optimizer=llava15.sft_optimizer(),
        data=DataConfig(tokenizer="data/tokenizer.model", seq_length=2048, max_images_per_sequence=3),
        run_dir=f"runs/{name}",
    )


def _tiny(name: str) -> MM1Config:
    """A model that learns to caption small images in minutes on two CPU cores [C]."""
    corpus = ".cache/demo-corpus"
    mixture = {"captions": 0.50, "questions": 0.44, "interleaved": 0.03, "text": 0.03}

    def sources(split: str) -> tuple[SourceConfig, ...]:
        return tuple(
            SourceConfig(name=source, path=f"{corpus}/prepared/{source}/{split}", weight=weight)
            for source, weight in mixture.items()
        )

    return MM1Config(
        name=name,
        model=ModelConfig(
            vision=VisionConfig(
                image_size=48, patch_size=12, num_layers=4, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4
            ),
            connector=ConnectorConfig(tokens_per_image=4, hidden_size=128, num_layers=1, num_attention_heads=4),
            decoder=DecoderConfig(
                num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=4096
            ),
        ),
        parallel=ParallelConfig(tensor_model_parallel_size=2, vision_parallel_mode="data"),
        data=DataConfig(
            tokenizer=f"{corpus}/tokenizer.model",
            sources=sources("train"),
            validation=sources("validation"),
            seq_length=256,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(lr=3e-3, lr_warmup_iters=60),
        training=TrainingConfig(
            micro_batch_size=4,
            global_batch_size=8,
            train_iters=700,
            eval_interval=250,
            eval_iters=4,
            precision="fp32",
        ),
        checkpoint=CheckpointConfig(save_interval=250),
        logging=LoggingConfig(log_interval=50),
        run_dir=f"runs/{name}",
    )


def _tiny_moe(name: str) -> MM1Config:
    """mm1-tiny with 4 experts in every second block, spread over two processes [C]."""
    tiny = _tiny(name)
    return replace(
        tiny,
        model=replace(tiny.model, moe=MoEConfig(num_moe_experts=4, moe_layer_freq=2)),
        parallel=ParallelConfig(expert_model_parallel_size=2),
    )


_BUILDERS: dict[str, Callable[[str], MM1Config]] = {
    "mm1-tiny": _tiny,
    "mm1-tiny-moe": _tiny_moe,
    "mm1-9m": partial(_law_grid, num_layers=3, hidden_size=512),
    "mm1-85m": partial(_law_grid, num_layers=12, hidden_size=768),
    "mm1-302m": partial(_law_grid, num_layers=24, hidden_size=1024),
    "mm1-1.2b": partial(_law_grid, num_layers=24, hidden_size=2048),
    "mm1-3b": partial(_mm1, decoder=DECODER_3B, lr=6e-5),  # [P] learning rates as used
    "mm1-7b": partial(_mm1, decoder=DECODER_7B, lr=4e-5),
    "mm1-30b": partial(_mm1, decoder=DECODER_30B, lr=2e-5, output_z_loss_coeff=1e-4),  # [M] z-loss
    "mm1-3b-moe": partial(_mm1, decoder=DECODER_3B, lr=6e-5, moe=MOE_3B),
    "mm1-7b-moe": partial(_mm1, decoder=DECODER_7B, lr=4e-5, moe=MOE_7B),
    "llava15-7b": partial(_llava15, decoder=DECODER_7B),
    "llava15-13b": partial(_llava15, decoder=LLAMA_13B),
}

PRESETS: tuple[str, ...] = tuple(_BUILDERS)


def preset(name: str) -> MM1Config:
    """The configuration called `name`, one of `PRESETS`.

    Raises:
        ConfigError: there is none of that name.
    """
    return chosen("preset", name, _BUILDERS)(name)
