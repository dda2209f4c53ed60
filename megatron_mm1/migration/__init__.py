"""Configurations of Megatron-LM's multimodal example as ours: `mm1 config from-megatron`. Imports no torch."""
