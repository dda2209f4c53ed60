"""Training: a trainer that reads top to bottom, and the steps it is made of."""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
