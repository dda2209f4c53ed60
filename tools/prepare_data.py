#!/usr/bin/env python3
"""Tokenize and index a data set for training: the same as `mm1 data prepare`."""

import sys

from megatron_mm1.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "prepare", *sys.argv[1:]]))
