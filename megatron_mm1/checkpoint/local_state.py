"""From the names of checkpoints to those of modules that are whole in one process."""

from collections.abc import Mapping

from torch import Tensor

from megatron_mm1.model.vision import FUSED_NORM_NAMES

_STACK = ".mlp.experts.experts."


def local_state_dict(tensors: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of an `MM1Model` (local backend, one process), or of a part of it.

    Norms have names of their own there, not those they get where Transformer Engine fuses them into the linear layer
    that follows, and each expert is a module.

    Args:
        tensors: by the names they have in checkpoints.
        prefix: of the part's names ("tower.", "language_model."), left out of the result; others are dropped.
    """
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for local, fused in FUSED_NORM_NAMES.items():
            name = name.replace(f".{fused}", f".{local}")
        if _STACK in name:
            for expert, weight in enumerate(tensor):
                state[name.replace(_STACK, f".mlp.experts.local_experts.{expert}.")] = weight
        else:
            state[name] = tensor
    return state
