"""One copy of the model: the ranks that answer together, and a pass through their pipeline stages."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.errors import UserError
from megatron_mm1.model.decoding import Pass, hidden_shape, run_stage
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.training.build import unwrap
from megatron_mm1.training.step import renew_fp8_weights


class Replica:
    """The ranks that share tensors, images, experts and pipeline stages, which run in step.

    Args:
        chunks: this rank's stages in the order they run, whatever wraps them.

    Attributes:
        count: copies of the model in the job; each can work on requests of its own.
        index: which copy this rank belongs to.
        is_leader: True on one rank of each copy.

    Raises:
        UserError: the layout's ranks do not fall into copies.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> None:
        self.chunks = [unwrap(chunk) for chunk in chunks]
        self.groups = groups
        self.is_first_stage = groups.pp.rank() == 0
        self.is_last_stage = groups.pp.rank() == groups.pp.size() - 1
        dense, experts = groups.tp_cp.size(), groups.tp_ep.size()
        span = math.lcm(dense, experts)
        if span > max(dense, experts):
            raise UserError(
                f"generation needs a layout in which tensor x context parallelism ({dense}) divides expert x expert "
                f"tensor parallelism ({experts}), or the other way round"
            )
        rank_in_stage = (groups.dp.rank() * groups.cp.size() + groups.cp.rank()) * groups.tp.size() + groups.tp.rank()
        self.count = groups.dp.size() * dense // span
        self.index = rank_in_stage // span
        self.is_leader = self.is_first_stage and rank_in_stage % span == 0

    @property
    def first(self) -> MM1Model:
        """The chunk that encodes images on the first stage, and any other's first."""
        return self.chunks[0]

    def logits(self, run: Pass, image_tokens: Tensor | None = None) -> Tensor | None:
        """A pass through all stages; every rank calls it with the same `run`.

        Args:
            image_tokens: of `run.slots`, on the first stage.

        Returns:
            As the last stage of `run_stage`, on ranks of that stage; None on others.
        """
        pp, received = self.groups.pp, None
        for chunk in self.chunks:
            if not chunk.pre_process:
                received = torch.empty(
                    hidden_shape(chunk, run), dtype=chunk.config.params_dtype, device=run.tokens.device
                )
                torch.distributed.recv(received, group=pp, group_src=(pp.rank() - 1) % pp.size())
            output = run_stage(chunk, run, received=received, image_tokens=image_tokens)
            if chunk.post_process:
                return output
            torch.distributed.send(output, group=pp, group_dst=(pp.rank() + 1) % pp.size())
        return None

    def agree(self, numbers: Tensor) -> Tensor:
        """What the last stage has, on every rank and the same to the bit: ranks that share experts or images computed
        it each for themselves, and may differ by rounding. Other stages give a tensor of the same shape and dtype.
        """
        groups = self.groups
        if groups.pp.size() > 1:
            torch.distributed.broadcast(numbers, group=groups.pp, group_src=groups.pp.size() - 1)
        for group in (groups.tp_cp, groups.tp_ep):
            if group.size() > groups.tp.size():
                torch.distributed.broadcast(numbers, group=group, group_src=0)
        return numbers

    def from_first_stage(self, numbers: Tensor) -> Tensor:
        """What the first stage has, on every stage."""
        if self.groups.pp.size() > 1:
            torch.distributed.broadcast(numbers, group=self.groups.pp, group_src=0)
        return numbers

    def share_out[Item, Result](
        self, items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]]
    ) -> list[Result]:
        """What `work` makes of the items, in their order, on every rank of the job; each copy of the model does its
        share. `work` gives a result for each item.
        """
        share = range(self.index, len(items), self.count)
        done = dict(zip(share, work([items[index] for index in share]), strict=True))
        gathered: list[dict[int, Result]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, done if self.is_leader else {})
        everything = {index: result for part in gathered for index, result in part.items()}
        return [everything[index] for index in range(len(items))]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Without gradients and as in evaluation; afterwards every module is in the mode it was in."""
        modes = [(module, module.training) for chunk in self.chunks for module in chunk.modules()]
        for chunk in self.chunks:
            chunk.eval()
        renew_fp8_weights(self.chunks)
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
