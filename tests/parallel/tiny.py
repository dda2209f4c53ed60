"""The smallest run of the trainer that has everything: images, sources of several kinds, two blocks of decoder."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_mm1.config import MM1Config
from megatron_mm1.config.presets import preset
from tests.parallel.jobs import with_parallel


def tiny_config(run_dir: Path, *, steps: int, name: str = "mm1-tiny", **sizes: Any) -> MM1Config:
    """`steps` steps of four short sequences of the demo corpus; `sizes` are `parallel.*`."""
    config = with_parallel(preset(name), **sizes)
    model = dataclasses.replace(
        config.model,
        decoder=dataclasses.replace(config.model.decoder, num_layers=2, hidden_size=32, ffn_hidden_size=48),
        vision=dataclasses.replace(config.model.vision, num_layers=1, hidden_size=32, ffn_hidden_size=64),
        connector=dataclasses.replace(config.model.connector, hidden_size=16),
    )
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        model=model,
        training=dataclasses.replace(
            config.training, train_iters=steps, eval_interval=0, micro_batch_size=1, global_batch_size=4
        ),
        optimizer=dataclasses.replace(config.optimizer, lr_warmup_iters=1, lr_decay_iters=1000),
        data=dataclasses.replace(config.data, validation=(), seq_length=64, max_images_per_sequence=8),
        checkpoint=dataclasses.replace(config.checkpoint, save_interval=2),
        logging=dataclasses.replace(config.logging, log_interval=1, tensorboard=False),
    )
