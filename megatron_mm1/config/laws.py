"""The published scaling laws that set hyperparameters."""

import math

PUBLISHED_SIZES: dict[str, tuple[float, str]] = {
    "mm1-9m": (9.4e6, "non-embedding"),
    "mm1-85m": (85e6, "non-embedding"),
    "mm1-302m": (302e6, "non-embedding"),
    "mm1-1.2b": (1.2e9, "non-embedding"),
    "mm1-3b": (2.9e9, "non-embedding"),
    "mm1-7b": (6.4e9, "non-embedding"),
    "mm1-30b": (30e9, "non-embedding"),
    "mm1-3b-moe": (64e9, "total"),
    "mm1-7b-moe": (47e9, "total"),
}
"""What the paper says of the size of each preset, and what it counts [P]."""


def law_parameters(num_layers: int, hidden_size: int) -> int:
    """The decoder size N that the laws are written in: 12 L d^2, no embeddings [P/M]."""
    return 12 * num_layers * hidden_size**2


def peak_learning_rate(num_parameters: float) -> float:
    """Peak learning rate of a decoder with N non-embedding parameters: exp(-0.4214 ln N - 0.5535) [P].

    Weight decay follows it as lambda = 0.1 eta in decoupled form [P/M]; PyTorch's AdamW multiplies its `weight_decay`
    by the learning rate itself, so there the law is the constant 0.1 that `OptimizerConfig` has.
    """
    if num_parameters <= 0:
        raise ValueError(f"num_parameters must be positive, not {num_parameters}")
    return math.exp(-0.4214 * math.log(num_parameters) - 0.5535)


def swiglu_ffn_size(hidden_size: int, *, multiple: int = 256) -> int:
    """Feed-forward width with the parameters of a plain 4 d one: 8/3 d, rounded up to `multiple` [C]."""
    return -(-8 * hidden_size // (3 * multiple)) * multiple
