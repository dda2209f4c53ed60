"""Which microbatch of a global batch goes to which data-parallel rank: images shared out evenly, nothing else changed.

The tower's work is in proportion to its images, and a step takes as long as the rank with the most. Every rank works
out the whole deal from the plan: that takes no communication, and a run resumes with any data-parallel size.
"""

from dataclasses import dataclass

import numpy as np

from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.mixture import Plan


def deal(images: np.ndarray, *, num_ranks: int) -> np.ndarray:
    """Deal out microbatches so that the rank with the most images has as few as possible.

    Args:
        images: [n] images of each microbatch.
        num_ranks: divides n.

    Returns:
        [num_ranks, n / num_ranks] int64, the microbatches of each rank in the order it runs them: most images first,
        so that all ranks have similar ones at the same time (with expert parallelism they wait for each other in every
        microbatch) and a pipeline ends on a short one. One rank alone keeps the given order.

        The most images of a rank are never more than if microbatches were dealt in turn (0, 1, .., 0, 1, ..), and no
        exchange of two microbatches would make them fewer.
    """
    if len(images) % num_ranks:
        raise ValueError(f"{len(images)} microbatches cannot be dealt evenly to {num_ranks} ranks")
    in_turn = np.arange(len(images)).reshape(-1, num_ranks).T
    if num_ranks == 1:
        return in_turn
    starts = (_deal_by_rounds(images, num_ranks=num_ranks), in_turn)
    shares = np.sort(min((_exchange(images, start) for start in starts), key=lambda shares: _most(images, shares)))
    return np.take_along_axis(shares, np.argsort(-images[shares], axis=1, kind="stable"), axis=1)


def _most(images: np.ndarray, shares: np.ndarray) -> int:
    return int(images[shares].sum(axis=1).max())


def _deal_by_rounds(images: np.ndarray, *, num_ranks: int) -> np.ndarray:
    """Rounds of microbatches with similar numbers of images, one for each rank; the widest round first, and in each the
    microbatch with the most images to the rank with the fewest so far.
    """
    rounds = np.argsort(-images, kind="stable").reshape(-1, num_ranks)
    counts = images[rounds]
    shares = np.empty_like(rounds.T)
    totals = np.zeros(num_ranks, np.int64)
    for number in np.argsort(counts[:, -1] - counts[:, 0], kind="stable"):
        least_first = np.argsort(totals, kind="stable")
        shares[least_first, number] = rounds[number]
        totals[least_first] += counts[number]
    return shares


def _exchange(images: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Exchange microbatches, one for one, of the rank with the most images while it gets fewer by that."""
    shares = shares.copy()
    fewest_possible = -(-int(images.sum()) // len(shares))
    while True:
        counts = images[shares]
        totals = counts.sum(axis=1)
        rank = int(totals.argmax())
        if totals[rank] == fewest_possible:
            return shares
        sizes, places = np.unique(counts[rank], return_index=True)
        given = sizes[:, None, None] - counts  # [sizes, ranks, places]: by how many images `rank` would have fewer
        most = np.maximum(totals[rank] - given, totals[:, None] + given)
        size, other, place = np.unravel_index(most.argmin(), most.shape)
        if most[size, other, place] >= totals[rank]:
            return shares
        own = (rank, places[size])
        shares[own], shares[other, place] = shares[other, place], shares[own]


@dataclass(frozen=True)
class Dealer:
    """The deal of every global batch of a run; the sequences of a microbatch depend on the plan and its size only.

    Attributes:
        plan: the order of training.
        micro_batch_size: sequences; microbatch j of the run holds the plan's sequences from j * micro_batch_size on.
        batch_sizes: which sequences make up each global batch; their sizes are multiples of dp_size *
            micro_batch_size.
        dp_size: data-parallel ranks.
        text_only: images are left out of the batches.
    """

    plan: Plan
    micro_batch_size: int
    batch_sizes: BatchSizes
    dp_size: int
    text_only: bool = False

    @staticmethod
    def of(config: MM1Config, plan: Plan, *, dp_size: int) -> "Dealer":
        training = config.training
        return Dealer(
            plan,
            micro_batch_size=training.micro_batch_size,
            batch_sizes=BatchSizes.of(training),
            dp_size=dp_size,
            text_only=config.data.text_only,
        )

    def num_images(self, global_batch: int) -> np.ndarray:
        """[n] images of each microbatch of a global batch, in the plan's order."""
        sequences = range(*map(self.batch_sizes.sequences_before, (global_batch, global_batch + 1)))
        images = [0 if self.text_only else self.plan.num_images(index) for index in sequences]
        return np.array(images, np.int64).reshape(-1, self.micro_batch_size).sum(axis=1)

    def microbatches(self, global_batch: int, *, dp_rank: int) -> list[int]:
        """The microbatches of a global batch that a rank runs, in its order, numbered over the whole run."""
        first = self.batch_sizes.sequences_before(global_batch) // self.micro_batch_size
        mine = deal(self.num_images(global_batch), num_ranks=self.dp_size)[dp_rank]
        return (first + mine).tolist()

    def images_per_rank(self, global_batch: int) -> np.ndarray:
        """[dp_size] images of a global batch that each rank encodes."""
        images = self.num_images(global_batch)
        return images[deal(images, num_ranks=self.dp_size)].sum(axis=1)


def imbalance(images_per_rank: np.ndarray) -> float:
    """Most images of a rank over the mean, 1 if they have equally many (or none)."""
    return float(images_per_rank.max() / images_per_rank.mean()) if images_per_rank.any() else 1.0
