#!/usr/bin/env python3
"""Import, export and change checkpoints: the same as `mm1 convert`."""

import sys

from megatron_mm1.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
