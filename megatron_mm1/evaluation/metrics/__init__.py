"""Metrics: each compares predictions with truths as its benchmark's own code does, and returns measures per item."""
