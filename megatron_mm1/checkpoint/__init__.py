"""Other projects' weights under our names."""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
