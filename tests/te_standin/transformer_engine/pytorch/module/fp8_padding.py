"""Fp8Padding and Fp8Unpadding: each group of rows to a multiple of what the recipe in force needs, and back."""

from types import SimpleNamespace

import torch
from torch import Tensor

from transformer_engine._release import released
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, get_align_size_for_quantization


class _Aligned(torch.nn.Module):
    num_gemms: int
    align_size: int | None

    def padded(self, splits: list[int]) -> list[int]:
        assert len(splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        if self.align_size is None:
            self.align_size = get_align_size_for_quantization(FP8GlobalStateManager.get_fp8_recipe())
        return [-(-rows // self.align_size) * self.align_size for rows in splits]


class Fp8Padding(_Aligned):
    @released("pytorch/module/fp8_padding.py", "num_gemms", "align_size")
    def __init__(self, arguments: SimpleNamespace) -> None:
        torch.nn.Module.__init__(self)
        self.num_gemms, self.align_size = arguments.num_gemms, arguments.align_size

    @released("pytorch/module/fp8_padding.py", "inp", "m_splits")
    def forward(self, arguments: SimpleNamespace) -> tuple[Tensor, list[int]]:
        padded = self.padded(arguments.m_splits)
        parts = [
            torch.nn.functional.pad(part, (0, 0, 0, rows - len(part)))
            for part, rows in zip(arguments.inp.split(arguments.m_splits), padded, strict=True)
        ]
        return torch.cat(parts), padded


class Fp8Unpadding(_Aligned):
    @released("pytorch/module/fp8_unpadding.py", "num_gemms", "align_size")
    def __init__(self, arguments: SimpleNamespace) -> None:
        torch.nn.Module.__init__(self)
        self.num_gemms, self.align_size = arguments.num_gemms, arguments.align_size

    @released("pytorch/module/fp8_unpadding.py", "inp", "m_splits")
    def forward(self, arguments: SimpleNamespace) -> Tensor:
        parts = arguments.inp.split(self.padded(arguments.m_splits))
        return torch.cat([part[:rows] for part, rows in zip(parts, arguments.m_splits, strict=True)])
