"""Whether the model that a conversion makes can be built, before anything is read or written."""

from megatron_mm1.config import DataConfig, MM1Config, ModelConfig, OptimizerConfig, TrainingConfig
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError


def model_problems(model: ModelConfig, data: DataConfig | None = None) -> tuple[str, ...]:
    """What is wrong with a model by itself: in one process, with the least of everything that is not part of it.

    Args:
        data: checked with it, as to how its images become tokens; None: it gets none.
    """
    config = MM1Config(
        name="model",
        model=model,
        optimizer=OptimizerConfig(lr=1.0),
        data=data or DataConfig(max_images_per_sequence=0),
        training=TrainingConfig(global_batch_size=1),
    )
    try:
        validate(config, world_size=1)
    except ConfigError as error:
        return error.problems
    return ()
