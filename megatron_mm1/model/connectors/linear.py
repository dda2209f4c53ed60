"""Which linear layer the built-in connectors are made with: torch's, or Transformer Engine's in its place."""

from collections.abc import Callable

import torch

Linear = Callable[[int, int], torch.nn.Module]
"""(input width, output width) -> a module with the parameters and initial weights of torch.nn.Linear."""
