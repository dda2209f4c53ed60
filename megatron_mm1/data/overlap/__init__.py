"""Contamination: what of an evaluation set training data holds, by image and by text."""

from megatron_mm1.data.overlap.data_sets import Sample, open_data_set
from megatron_mm1.data.overlap.report import overlap_main
from megatron_mm1.data.overlap.search import Hit, Kind, Overlap, Settings, find_overlap

__all__ = ["Hit", "Kind", "Overlap", "Sample", "Settings", "find_overlap", "open_data_set", "overlap_main"]
