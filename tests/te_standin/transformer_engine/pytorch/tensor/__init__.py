"""Quantised tensors: the class that megatron-core asks for. Products here are not quantised, so there are none."""

import torch


class QuantizedTensor(torch.Tensor): ...
