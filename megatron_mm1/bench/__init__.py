"""How fast a training step is, and where its time goes: `mm1 bench step`."""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
