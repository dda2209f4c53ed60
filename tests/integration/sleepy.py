"""A connector that falls asleep on rank 1: a part of one's own that makes a training run hang."""

import os
import time
from typing import Any

from torch import Tensor

from megatron_mm1.model.connectors.pooling import AveragePool

BATCHES_AWAKE = 5


class Sleepy(AveragePool):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches = 0

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        self.batches += 1
        if self.batches > BATCHES_AWAKE and os.environ["RANK"] == "1":
            time.sleep(600)
        return super().forward(features, grid)
