"""Named sets of settings over a preset (`--recipe`): what a stage of training changes about a model's configuration.

[P] quoted from the papers, [M] widely reported, [C] our choice where they are silent (docs/facts.md).
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_mm1.config import llava15
from megatron_mm1.config.choice import chosen
from megatron_mm1.config.presets import paper_sources
from megatron_mm1.config.schema import MM1Config, OptimizerConfig, SourceConfig

MM1_5_MIXTURE = {"captions": 0.5, "interleaved": 0.1, "text": 0.4}
"""[P]"""


def _sft(config: MM1Config) -> MM1Config:
    """Supervised fine-tuning on prepared conversations, from the weights of `checkpoint.load`."""
    seq_length = 2048  # [P]
    most_images = (seq_length - 2) // config.model.connector.tokens_per_image
    return replace(
        config,
        data=replace(
            config.data,
            # [C] conversations are few, so documents are counted, and sequences hold those of all sources.
            sources=(SourceConfig(name="instructions", path="data/instructions"),),
            validation=(),
            curriculum=(),
            mixture_unit="examples",
            packing="mixed",
            seq_length=seq_length,
            max_images_per_sequence=min(config.data.max_images_per_sequence, most_images),
            long_documents="cut",  # [C]
        ),
        optimizer=OptimizerConfig(
            optimizer="adafactor",  # [P]
            lr=1e-5,  # [P] of every part
            min_lr_ratio=0.0,  # [P] cosine to 0
            lr_warmup_iters=300,  # [C] 3 %, as LLaVA-1.5
            weight_decay=0.0,  # [C]
        ),
        training=replace(
            config.training,
            global_batch_size=256,  # [P]
            batch_size_ramp=(),
            train_iters=10_000,  # [P]
            freeze=(),  # [P] tower and decoder are trained; [C] the connector too
            frozen_steps={},
            output_z_loss_coeff=0.0,  # [C]
        ),
        checkpoint=replace(config.checkpoint, finetune=True),
        evaluation=replace(config.evaluation, chat=True),  # [C] asked as it was trained
        run_dir=f"{config.run_dir}-sft",
    )


def _mm1_5_mixture(config: MM1Config) -> MM1Config:
    """MM1.5's mixture of the same three kinds of data in pre-training."""
    return replace(config, data=replace(config.data, sources=paper_sources(MM1_5_MIXTURE)))


_BUILDERS: dict[str, Callable[[MM1Config], MM1Config]] = {
    "sft": _sft,
    "mm1.5-mixture": _mm1_5_mixture,
    "llava15-align": llava15.align,
    "llava15-sft": llava15.sft,
}

RECIPES: tuple[str, ...] = tuple(_BUILDERS)


def apply_recipe(name: str, config: MM1Config) -> MM1Config:
    """`config` as the recipe called `name`, one of `RECIPES`, has it.

    Raises:
        ConfigError: there is none of that name.
    """
    return chosen("recipe", name, _BUILDERS)(config)
