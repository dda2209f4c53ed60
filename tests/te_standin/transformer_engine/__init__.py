"""A stand-in for Transformer Engine that computes with plain torch on a CPU.

It is put in front of sys.path, with the unpacked wheel of the pinned release behind it (tests/te_process.py).
What the wheel has in Python and can run without CUDA is the release's own: signatures of every class and function,
recipes, rotary embedding, the check of FP8 dimensions, the alignment that grouped FP8 products need. The rest is
written here: products, norms, attention and permutation in torch, and the communication of tensor parallelism.
Products are never quantised: what FP8 layers share with the real ones is what they are called with, in which recipe,
and which shapes they refuse.

A module records its construction (`te_arguments`, `te_initialised_in`) and its forward passes (`te_calls`). An
argument that the stand-in does not act on raises NotImplementedError unless it has its default value.
"""

from importlib import metadata

from transformer_engine import common, pytorch

__version__ = metadata.version("transformer_engine")
__all__ = ["common", "pytorch"]
