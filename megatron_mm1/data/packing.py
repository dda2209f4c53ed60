"""Splitting over-long documents and packing documents into sequences: pure functions of lengths."""

from collections.abc import Sequence

import numpy as np

from megatron_mm1.errors import UserError


def split_document(
    num_tokens: int, image_positions: Sequence[int], *, tokens_per_image: int, seq_length: int, max_images: int
) -> list[tuple[int, int]]:
    """Cut a document into stretches that fit a sequence.

    An image is never cut, and none is left at the end of a stretch where the text it introduces could not follow it,
    unless the stretch holds nothing else.

    Args:
        num_tokens: stored tokens, one per image.
        image_positions: increasing places of the images among them.
        tokens_per_image: positions an image takes in a sequence.
        seq_length, max_images: limits of a sequence.

    Returns:
        (start, stop) in stored tokens, one after another, all of the document.

    Raises:
        UserError: one image alone does not fit.
    """
    if len(image_positions) and (tokens_per_image > seq_length or max_images < 1):
        raise UserError(
            f"an image takes {tokens_per_image} tokens, a sequence holds {seq_length} tokens and {max_images} images: "
            "raise data.seq_length or data.max_images_per_sequence"
        )
    stretches = []
    start = first = 0  # first: index of the first image at or after start
    while start < num_tokens:
        stop, room, image = start, seq_length, first
        while stop < num_tokens:
            next_image = image_positions[image] if image < len(image_positions) else num_tokens
            if stop < next_image:
                taken = min(next_image - stop, room)
                if not taken:
                    break
                stop, room = stop + taken, room - taken
            elif room < tokens_per_image or image - first == max_images:
                break
            else:
                stop, room, image = stop + 1, room - tokens_per_image, image + 1
        if stop < num_tokens:
            end, last = stop, image
            while last > first and image_positions[last - 1] == end - 1:
                end, last = end - 1, last - 1
            if end > start:
                stop, image = end, last
        stretches.append((start, int(stop)))
        start, first = int(stop), image
    return stretches


def pack_best_fit(
    lengths: np.ndarray, num_images: np.ndarray, *, seq_length: int, max_images: int, lookahead: int
) -> list[list[int]]:
    """Pack items into sequences, best fit over the `lookahead` sequences that are still open.

    Args:
        lengths: [n] positions of each item, each 1 to `seq_length`.
        num_images: [n] images of each item, each at most `max_images`.

    Returns:
        Item indices of each sequence, each sequence in the items' order, every item once.
    """
    if len(lengths) and (lengths.max() > seq_length or lengths.min() < 1 or num_images.max() > max_images):
        raise ValueError("every item must have a length and fit a sequence")
    room: list[int] = []
    image_room: list[int] = []
    members: list[list[int]] = []
    packed = []

    def close(sequence: int) -> None:
        packed.append(members.pop(sequence))
        del room[sequence], image_room[sequence]

    for item, (length, images) in enumerate(zip(lengths.tolist(), num_images.tolist(), strict=True)):
        best, best_room = -1, seq_length + 1
        for sequence, free in enumerate(room):
            if length <= free < best_room and images <= image_room[sequence]:
                best, best_room = sequence, free
        if best < 0:
            if len(room) == lookahead:
                close(min(range(len(room)), key=room.__getitem__))
            best = len(room)
            room.append(seq_length)
            image_room.append(max_images)
            members.append([])
        room[best] -= length
        image_room[best] -= images
        members[best].append(item)
        if not room[best]:
            close(best)
    return packed + members
