"""`python -m megatron_mm1` and `torchrun -m megatron_mm1`: the `mm1` command."""

import sys

from megatron_mm1.cli import main

# Checkpoint writers and data loaders spawn processes that import this module again.
if __name__ == "__main__":
    sys.exit(main())
