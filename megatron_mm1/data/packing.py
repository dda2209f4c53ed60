"""Splitting over-long documents and packing documents into sequences: pure functions of lengths, compiled by numba."""

from collections.abc import Sequence

import numpy as np
from numba import njit

from megatron_mm1.errors import UserError


def split_documents(
    num_tokens: np.ndarray,
    image_bounds: np.ndarray,
    image_positions: np.ndarray,
    image_tiles: np.ndarray,
    image_lengths: np.ndarray,
    *,
    seq_length: int,
    max_images: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into stretches that fit a sequence.

    An image is never cut, and none is left at the end of a stretch where the text it introduces could not follow it,
    unless the stretch holds nothing else.

    Args:
        num_tokens: [D] int64 stored tokens of each document, one per image.
        image_bounds: [D + 1] int64, which of the images are each document's.
        image_positions: [I] int64, where each stands among its document's stored tokens, increasing.
        image_tiles: [I] int64, pictures that the tower encodes for each.
        image_lengths: [I] int64, positions that each takes in a sequence.
        seq_length, max_images: limits of a sequence; every tile counts as an image.

    Returns:
        [P, 3] int64 (number of the document here, start, stop), in order, all of every document; [P] positions that
        each takes; [P] its tiles.

    Raises:
        UserError: one image alone does not fit.
    """
    most, longest = int(image_tiles.max(initial=0)), int(image_lengths.max(initial=0))
    if longest > seq_length or most > max_images:
        raise UserError(
            f"an image takes {longest} tokens (of {most} images), a sequence holds {seq_length} tokens and "
            f"{max_images} images: raise data.seq_length or data.max_images_per_sequence"
        )
    arrays = (num_tokens, image_bounds, image_positions, image_tiles, image_lengths)
    return _split(*(np.ascontiguousarray(array, np.int64) for array in arrays), seq_length, max_images)


@njit(cache=True, nogil=True)
def _split(
    num_tokens: np.ndarray,
    image_bounds: np.ndarray,
    image_positions: np.ndarray,
    image_tiles: np.ndarray,
    image_lengths: np.ndarray,
    seq_length: int,
    max_images: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = 16
    pieces = np.empty((size, 3), np.int64)
    lengths = np.empty(size, np.int64)
    tiles = np.empty(size, np.int64)
    count = 0
    for document in range(len(num_tokens)):
        total, after_last = num_tokens[document], image_bounds[document + 1]
        start, first = 0, image_bounds[document]
        while start < total:
            stop, image, room, image_room = start, first, seq_length, max_images
            while stop < total:
                next_image = image_positions[image] if image < after_last else total
                if stop < next_image:
                    taken = min(next_image - stop, room)
                    if taken == 0:
                        break
                    stop += taken
                    room -= taken
                elif room < image_lengths[image] or image_room < image_tiles[image]:
                    break
                else:
                    stop += 1
                    room -= image_lengths[image]
                    image_room -= image_tiles[image]
                    image += 1
            if stop < total:
                end, last = stop, image
                while last > first and image_positions[last - 1] == end - 1:
                    end -= 1
                    last -= 1
                if end > start:
                    while image > last:
                        image -= 1
                        stop -= 1
                        room += image_lengths[image]
                        image_room += image_tiles[image]
            if count == size:
                size *= 2
                more_pieces = np.empty((size, 3), np.int64)
                more_lengths = np.empty(size, np.int64)
                more_tiles = np.empty(size, np.int64)
                more_pieces[:count], more_lengths[:count], more_tiles[:count] = pieces, lengths, tiles
                pieces, lengths, tiles = more_pieces, more_lengths, more_tiles
            pieces[count, 0], pieces[count, 1], pieces[count, 2] = document, start, stop
            lengths[count], tiles[count] = seq_length - room, max_images - image_room
            count += 1
            start, first = stop, image
    return pieces[:count], lengths[:count], tiles[:count]


def cut_documents(
    trained: Sequence[np.ndarray],
    image_bounds: np.ndarray,
    image_positions: np.ndarray,
    image_tiles: np.ndarray,
    image_lengths: np.ndarray,
    *,
    seq_length: int,
    max_images: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut each document where the last of its trained stretches ends that fits a sequence.

    Args:
        trained: [tokens] bool of each document; the others as of `split_documents`.

    Returns:
        [P, 3] int64 (number of the document here, 0, stop) of those of which something is left, in order; [P] positions
        that each takes; [P] its tiles.
    """
    pieces, lengths, tiles = [], [], []
    for number, flags in enumerate(trained):
        ends = np.flatnonzero(flags & ~np.append(flags[1:], False)) + 1
        images = slice(*image_bounds[number : number + 2].tolist())
        before = np.searchsorted(image_positions[images], ends)  # how many images
        num_tiles, taken = (
            np.concatenate([[0], np.cumsum(of_image[images])])[before] for of_image in (image_tiles, image_lengths)
        )
        positions = ends - before + taken
        fitting = np.flatnonzero((positions <= seq_length) & (num_tiles <= max_images))
        if len(fitting):
            last = fitting[-1]
            pieces.append((number, 0, int(ends[last])))
            lengths.append(int(positions[last]))
            tiles.append(int(num_tiles[last]))
    return np.array(pieces, np.int64).reshape(-1, 3), np.array(lengths, np.int64), np.array(tiles, np.int64)


def pack_best_fit(
    lengths: np.ndarray, num_images: np.ndarray, *, seq_length: int, max_images: int, lookahead: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into sequences, best fit over the `lookahead` sequences that are still open.

    An item goes where it leaves the least room. Where it fits nowhere the fullest sequence is closed, by tokens or by
    images. What is left open at the end is packed once more, longest first.

    Args:
        lengths: [n] positions of each item, each 1 to `seq_length`.
        num_images: [n] images of each item, each at most `max_images`.

    Returns:
        [n] int64, items sequence by sequence, in each in the given order; [m + 1] int64, where each sequence begins.
    """
    if len(lengths) and (lengths.max() > seq_length or lengths.min() < 1 or num_images.max() > max_images):
        raise ValueError("every item must have a length and fit a sequence")
    lengths, num_images = np.ascontiguousarray(lengths, np.int64), np.ascontiguousarray(num_images, np.int64)
    sequence, still_open, count = _best_fit(lengths, num_images, seq_length, max_images, lookahead)
    rest = np.flatnonzero(sequence >= still_open)
    longest_first = rest[np.argsort(-lengths[rest], kind="stable")]
    again, _, more = _best_fit(
        lengths[longest_first], num_images[longest_first], seq_length, max_images, max(1, len(rest))
    )
    if still_open + more <= count:
        sequence[longest_first], count = still_open + again, still_open + more
    items = np.argsort(sequence, kind="stable")
    return items, np.searchsorted(sequence[items], np.arange(count + 1))


@njit(cache=True, nogil=True)
def _best_fit(
    lengths: np.ndarray, num_images: np.ndarray, seq_length: int, max_images: int, lookahead: int
) -> tuple[np.ndarray, int, int]:
    """[n] sequence of each item, numbered as they are closed; the number of closed ones; the number of all."""
    room = np.empty(lookahead, np.int64)
    image_room = np.empty(lookahead, np.int64)
    name = np.empty(lookahead, np.int64)  # of each open sequence, in the order of opening
    number = np.empty(len(lengths) + 1, np.int64)  # of each sequence by its name, in the order of closing
    sequence = np.empty(len(lengths), np.int64)
    opened, closed, num_open = 0, 0, 0
    for item in range(len(lengths)):
        length, images = lengths[item], num_images[item]
        best, best_room = -1, seq_length + 1
        for place in range(num_open):
            if length <= room[place] < best_room and images <= image_room[place]:
                best, best_room = place, room[place]
        if best < 0:
            if num_open == lookahead:
                fullest, most = 0, -1.0
                for place in range(num_open):
                    fill = 1 - room[place] / seq_length
                    if max_images > 0:
                        fill = max(fill, 1 - image_room[place] / max_images)
                    if fill > most:
                        fullest, most = place, fill
                number[name[fullest]] = closed
                closed += 1
                best = fullest
            else:
                best = num_open
                num_open += 1
            room[best], image_room[best], name[best] = seq_length, max_images, opened
            opened += 1
        room[best] -= length
        image_room[best] -= images
        sequence[item] = name[best]
        if room[best] == 0:
            number[name[best]] = closed
            closed += 1
            num_open -= 1
            room[best], image_room[best], name[best] = room[num_open], image_room[num_open], name[num_open]
    for place in range(num_open):
        number[name[place]] = closed + place
    for item in range(len(lengths)):
        sequence[item] = number[sequence[item]]
    return sequence, closed, opened
