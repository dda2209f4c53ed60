"""Text out of a trained model: generation, likelihoods of given text, captions of image files."""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
