"""The two stages of LLaVA-1.5 (Liu et al., 2023, arXiv 2310.03744): alignment of the connector, then fine-tuning.

[P] the paper's table of hyper-parameters, [M] its published scripts and code, [C] our choice (docs/llava15.md).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_mm1.config.schema import MM1Config, OptimizerConfig, SourceConfig

_WARMUP = 0.03  # [P] of the steps


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is another in the two stages.

    Attributes:
        examples: of its published data, which it sees once.
        image_resize: see `VisionConfig`.
    """

    name: str
    source: str
    examples: int
    batch: int
    lr: float
    freeze: tuple[Literal["tower", "connector", "decoder"], ...]
    image_resize: Literal["shorter_side_crop", "pad"]

    @property
    def steps(self) -> int:
        return math.ceil(self.examples / self.batch)


_ALIGN = _Stage(
    name="align",
    source="llava_pretrain_558k",
    examples=558_128,  # [M] entries of blip_laion_cc_sbu_558k.json
    batch=256,  # [P]
    lr=1e-3,  # [P]
    freeze=("tower", "decoder"),  # [P]
    image_resize="shorter_side_crop",  # [M]
)
_SFT = _Stage(
    name="sft",
    source="llava_mix_665k",
    examples=665_298,  # [M] entries of llava_v1_5_mix665k.json
    batch=128,  # [P]
    lr=2e-5,  # [P]
    freeze=("tower",),  # [M]
    image_resize="pad",  # [M]
)


def align(config: MM1Config) -> MM1Config:
    """Only the connector is trained, on captions."""
    return _stage(config, _ALIGN)


def sft(config: MM1Config) -> MM1Config:
    """Connector and decoder are trained, on conversations."""
    return _stage(config, _SFT)


def sft_optimizer() -> OptimizerConfig:
    """That of fine-tuning."""
    return _optimizer(_SFT)


def _stage(config: MM1Config, stage: _Stage) -> MM1Config:
    seq_length = 2048  # [M]
    most_images = (seq_length - 2) // config.model.connector.tokens_per_image
    return replace(
        config,
        model=replace(config.model, vision=replace(config.model.vision, image_resize=stage.image_resize)),
        data=replace(
            config.data,
            sources=(SourceConfig(name=stage.source, path=f"data/{stage.source}"),),
            validation=(),
            curriculum=(),
            mixture_unit="examples",
            packing="none",  # [M] a step takes `batch` examples, no more
            seq_length=seq_length,
            max_images_per_sequence=min(config.data.max_images_per_sequence, most_images),
            long_documents="cut",  # [C] LLaVA cuts anywhere
            image_tiling="none",
            random_resized_crop=None,
            text_only=False,
        ),
        optimizer=_optimizer(stage),
        training=replace(
            config.training,
            global_batch_size=stage.batch,
            batch_size_ramp=(),
            train_iters=stage.steps,
            freeze=stage.freeze,
            frozen_steps={},
            output_z_loss_coeff=0.0,
        ),
        checkpoint=replace(config.checkpoint, finetune=True),
        run_dir=f"{config.run_dir}-{stage.name}",
    )


def _optimizer(stage: _Stage) -> OptimizerConfig:
    return OptimizerConfig(
        lr=stage.lr,
        min_lr_ratio=0.0,  # [P] cosine, to 0
        lr_warmup_iters=math.ceil(_WARMUP * stage.steps),
        weight_decay=0.0,  # [P]
        adam_beta1=0.9,  # [M] this and the rest are the defaults of transformers' Trainer
        adam_beta2=0.999,
        adam_eps=1e-8,
        clip_grad=1.0,
    )
