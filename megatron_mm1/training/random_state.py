"""The random number generators of a rank, to go on drawing where a run stopped."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

KEY = "rng_state"


def sharded_random_state() -> ShardedObject:
    """This rank's generators, as a part of a checkpoint."""
    return _described(random_state())


def place_for_random_state() -> ShardedObject:
    """What this rank's generators are read into; only where as many ranks wrote them."""
    return _described(None)


def _described(data: Any) -> ShardedObject:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject(KEY, data, (world_size,), (rank,))


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators and of megatron-core's tracker; plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator to what `random_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    # A GPU's generators have states of another form: from one kind of device to the other they keep their seeds.
    if (state["cuda"] is not None) == torch.cuda.is_available():
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
