"""The few-shot protocol: demonstrations drawn from the training split in front of each item."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import Item, Prompt, in_low_resolution
from megatron_mm1.evaluation.task import Task
from megatron_mm1.evaluation.template import Stopping, Template, extracted_answer, merged


@dataclass(frozen=True)
class FewShot:
    """How items are presented.

    Attributes:
        shots: demonstrations in front of each item.
        seed: of the draw.
        high_resolution: px, of the side of images in high resolution; None: every image has the size that the model
            was trained with.
        high_resolution_shots: how many demonstrations, the last ones, show their images in high resolution (in
            `high_resolution` px, or cut into tiles by a model that does so), as the item itself does; None: all. MM1
            has 3 after fine-tuning [M].
        chain_of_thought: demonstrations carry their reasoning, and the answer is taken out of the model's.
        permute_images: the control: no image of the demonstrations is where it belongs, and nothing else changes.

    Raises:
        UserError: a number is negative.
    """

    shots: int = 0
    seed: int = 0
    high_resolution: int | None = None
    high_resolution_shots: int | None = None
    chain_of_thought: bool = False
    permute_images: bool = False

    def __post_init__(self) -> None:
        if self.shots < 0 or (self.high_resolution_shots or 0) < 0:
            raise UserError(
                f"{self.shots} shots, {self.high_resolution_shots} of them in high resolution: give 0 or more"
            )

    def template(self, task: Task, item: Item) -> Template:
        """How `item` is written."""
        template = task.template(item)
        return template.reasoned() if self.chain_of_thought else template

    def stopping(self, task: Task) -> Stopping:
        """Where text generated for `task` ends."""
        return task.stopping.reasoned() if self.chain_of_thought and task.stopping.max_new_tokens else task.stopping

    def answer(self, generated: str) -> str:
        """The model's answer in what it generated."""
        return extracted_answer(generated) if self.chain_of_thought else generated.strip()


ZERO_SHOT = FewShot()


@dataclass(frozen=True)
class Request:
    """What is run on the model for an item.

    Attributes:
        prompt: text is generated behind it.
        scored: (prompt, continuation) pairs whose likelihood is wanted, one for each of the item's candidates.
        demonstrations: keys of the items shown, in order.
    """

    prompt: Prompt
    scored: tuple[tuple[Prompt, str], ...]
    demonstrations: tuple[str, ...]


def demonstration_pool(task: Task, settings: FewShot) -> tuple[Item, ...]:
    """What `task`'s demonstrations are drawn from.

    Raises:
        UserError: the task has no training split, or none of it carries its reasoning where it has to.
    """
    if not settings.shots:
        return ()
    pool = task.demonstrations().items
    if not settings.chain_of_thought:
        return pool
    reasoned = tuple(item for item in pool if item.rationale)
    if not reasoned:
        raise UserError("none of the task's demonstrations has a rationale: leave out the chain of thought")
    return reasoned


def draw(item: Item, pool: Sequence[Item], *, shots: int, seed: int = 0) -> tuple[Item, ...]:
    """Demonstrations for `item`, in the order they are shown.

    They depend on the seed, the item's key and the pool alone: not on the model, nor on which other items are
    evaluated. Those of fewer shots are the first of those of more. None has the item's key, its cluster or any of its
    images.

    Raises:
        UserError: the pool has too few.
    """
    drawn: list[Item] = []
    for index in _permutation(len(pool), random.Random(f"{seed}\0{item.key}")):
        if len(drawn) == shots:
            break
        if not _is_close(pool[index], item):
            drawn.append(pool[index])
    if len(drawn) < shots:
        raise UserError(
            f"{shots} shots, but of {len(pool)} demonstrations only {len(drawn)} are not about the images of item "
            f"{item.key!r}: ask for fewer shots or add training items"
        )
    return tuple(drawn)


def request(item: Item, task: Task, settings: FewShot, *, pool: Sequence[Item] = ()) -> Request:
    """The item behind its demonstrations.

    Args:
        pool: `demonstration_pool`, read once for all items.

    Raises:
        UserError: see `draw` and `with_permuted_images`.
    """
    shown = draw(item, pool, shots=settings.shots, seed=settings.seed)
    if settings.permute_images:
        shown = with_permuted_images(shown, random.Random(f"{settings.seed}\0images\0{item.key}"))
    num_small = 0 if settings.high_resolution_shots is None else max(0, len(shown) - settings.high_resolution_shots)
    small = [in_low_resolution(one) for one in shown[:num_small]]
    before = [part for one in (*small, *shown[num_small:]) for part in settings.template(task, one).answered(one)]
    template = settings.template(task, item)

    def behind(query: Item) -> Prompt:
        return merged([*before, *template.asked(query)])

    shows = [item.images if one.images is None else one.images for one in item.candidates]
    scored = tuple(
        (behind(replace(item, images=images)), one.text) for images, one in zip(shows, item.candidates, strict=True)
    )
    return Request(behind(item), scored, tuple(one.key for one in shown))


def with_permuted_images(shown: Sequence[Item], generator: random.Random) -> tuple[Item, ...]:
    """The same demonstrations with their images exchanged, so that none is in a place it was in.

    Raises:
        UserError: there are fewer than two images to exchange.
    """
    images = [image for one in shown for image in one.images]
    if len(images) < 2:
        raise UserError(f"the demonstrations have {len(images)} images: to exchange them takes two, so use more shots")
    order = list(range(len(images)))
    for last in range(len(order) - 1, 0, -1):  # Sattolo: one cycle through all places, so no image stays
        other = generator.randrange(last)
        order[last], order[other] = order[other], order[last]
    moved = iter([images[index] for index in order])
    return tuple(replace(one, images=tuple(next(moved) for _ in one.images)) for one in shown)


def _is_close(one: Item, item: Item) -> bool:
    in_cluster = item.cluster is not None and one.cluster == item.cluster
    images = {image.place for image in item.images}
    return one.key == item.key or in_cluster or any(image.place in images for image in one.images)


def _permutation(count: int, generator: random.Random) -> Iterator[int]:
    """0 .. count - 1 in random order, at the cost of what is taken of it."""
    moved: dict[int, int] = {}
    for left in range(count, 0, -1):
        index = generator.randrange(left)
        yield moved.get(index, index)
        moved[index] = moved.pop(left - 1, left - 1)
