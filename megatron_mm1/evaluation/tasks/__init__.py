"""Benchmarks, one a file: each reads its official files from a local folder."""
