"""Tasks, the runner that gives a checkpoint to them, and what comes out: figures with intervals, a contact sheet."""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
