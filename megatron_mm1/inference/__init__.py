"""Text out of a trained model: greedy generation, likelihoods, captions of image files."""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
