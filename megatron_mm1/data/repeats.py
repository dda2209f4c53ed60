"""Images that occur over and over in a corpus: found and taken out when all of it has been prepared."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm1.data.arrays import count_values, ranges
from megatron_mm1.data.files import new_folder
from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.prepared import DOCUMENT_COLUMNS, IMAGE_COLUMNS, QUARANTINE
from megatron_mm1.data.preparing import Summary, quarantine_line
from megatron_mm1.data.records import Reason, Rejected
from megatron_mm1.data.writer import write_hashed, write_index

_POSITION, _CHECKSUM = IMAGE_COLUMNS.index("position"), IMAGE_COLUMNS.index("checksum")
FREQUENT = "frequent.npy"
"""In the work folder: which images go."""


def drop_repeats(work: Path, parts: Sequence[Path], filters: InterleavedFilters) -> None:
    """Take images that occur too often out of all parts. What they are is written down first: a preparation that is
    killed in the middle goes on with the same ones.
    """
    assert filters.max_repeats is not None
    if not (work / FREQUENT).is_file():

        def rows() -> Iterator[np.ndarray]:
            return (np.load(part / "images.npy", mmap_mode="r") for part in parts)

        frequent = frequent_images(rows, max_repeats=filters.max_repeats)
        with (work / f"{FREQUENT}.partial").open("wb") as file:
            np.save(file, frequent)
        os.replace(work / f"{FREQUENT}.partial", work / FREQUENT)
    frequent = np.load(work / FREQUENT)
    for part in parts if len(frequent) else ():
        _rewrite(part, frequent, min_images=filters.min_images)


def _rewrite(part: Path, unwanted: np.ndarray, *, min_images: int) -> None:
    replacement = part.with_name(f"{part.name}.rewritten")
    shutil.rmtree(replacement, ignore_errors=True)
    with new_folder(replacement) as output:
        change = without_images(part, output, unwanted, min_images=min_images)
        if change is not None:
            os.link(part / "images.bin", output / "images.bin")
            _rewrite_summary(part, output, change)
    if change is not None:
        retired = part.with_name(f".{part.name}.retired.partial")
        os.rename(part, retired)
        os.rename(replacement, part)
        shutil.rmtree(retired)
    else:
        shutil.rmtree(replacement)


def _rewrite_summary(part: Path, output: Path, change: Mapping[str, Any]) -> None:
    before = Summary.load(part)
    emptied = change["rejected"]
    images = np.load(part / "documents.npy")[:, 1]
    gone = int((images[emptied + 1] - images[emptied]).sum())
    summary = replace(
        before,
        counts=Counter(change["counts"]),
        rejected=before.rejected + Counter({str(Reason.REPEATED_IN_CORPUS): len(emptied)}),
        dropped=before.dropped + Counter({str(Reason.REPEATED_IN_CORPUS): change["dropped"]}),
        images_seen=before.images_seen - gone,
        files=before.files | change["files"],
    )
    summary.check()
    summary.save(output)
    keys, bounds = (part / "keys.bin").read_bytes(), np.load(part / "documents.npy")[:, 2]
    shutil.copyfile(part / QUARANTINE, output / QUARANTINE)
    with (output / QUARANTINE).open("a", encoding="utf-8") as quarantine:
        for document in emptied.tolist():
            key = keys[bounds[document] : bounds[document + 1]].decode(errors="replace")
            rejected = Rejected(key, Reason.REPEATED_IN_CORPUS, "no other images")
            quarantine.write(quarantine_line(rejected, shard=""))


def frequent_images(parts: Callable[[], Iterator[np.ndarray]], *, max_repeats: int) -> np.ndarray:
    """Sorted int64 checksums that occur more than `max_repeats` times.

    Args:
        parts: starts a pass over the [I, 6] image rows of each part; the corpus is read once for every 32 M images.
    """
    total = sum(len(rows) for rows in parts())
    counted = count_values(lambda: (rows[:, _CHECKSUM] for rows in parts()), total)
    return np.sort(np.concatenate([values[counts > max_repeats] for values, counts in counted]))


def without_images(part: Path, output: Path, unwanted: np.ndarray, *, min_images: int) -> dict[str, Any] | None:
    """Write a part to `output` (all but images.bin) without the images whose checksums are `unwanted`.

    Returns:
        None where it has none of them. Else "files" (size and checksum by name), "counts" as `PartWriter`'s, "dropped"
        images in the documents that stay, and "rejected" [n] numbers of documents left with fewer than `min_images`.
    """
    documents, images = np.load(part / "documents.npy"), np.load(part / "images.npy")
    bad = np.isin(images[:, _CHECKSUM], unwanted)
    if not bad.any():
        return None
    owner = np.repeat(np.arange(len(documents) - 1), np.diff(documents[:, 1]))
    left = np.bincount(owner[~bad], minlength=len(documents) - 1)
    affected = np.bincount(owner[bad], minlength=len(documents) - 1) > 0
    stays = ~(affected & (left < min_images))
    keep_token = np.repeat(stays, np.diff(documents[:, 0]))
    keep_token[documents[owner[bad], 0] + images[bad, _POSITION]] = False
    keep_image = ~bad & stays[owner]
    new_images = images[keep_image]
    # A token moves to the front by as many as were taken out before it in its document.
    before = np.concatenate([[0], np.cumsum(keep_token)])
    start = documents[owner[keep_image], 0]
    new_images[:, _POSITION] = before[start + images[keep_image, _POSITION]] - before[start]
    sizes = np.stack(
        [
            before[documents[1:, 0]] - before[documents[:-1, 0]],
            np.bincount(owner[keep_image], minlength=len(documents) - 1),
            np.diff(documents[:, 2]),
        ],
        axis=1,
    )[stays]
    new_documents = np.concatenate([np.zeros((1, len(DOCUMENT_COLUMNS)), np.int64), np.cumsum(sizes, axis=0)])
    tokens = np.fromfile(part / "tokens.bin", np.int32)[keep_token]
    trained = np.fromfile(part / "trained.bin", np.uint8)[keep_token]
    keys = np.fromfile(part / "keys.bin", np.uint8)[ranges(documents[:-1, 2][stays], documents[1:, 2][stays])]
    contents = {"tokens.bin": tokens, "trained.bin": trained, "keys.bin": keys}
    files = {name: write_hashed(output / name, values.tobytes()) for name, values in contents.items()}
    files |= write_index(output, new_documents, new_images)
    return {
        "files": files,
        "counts": {
            "documents": len(new_documents) - 1,
            "images": len(new_images),
            "tokens": len(tokens),
            "trained_tokens": int(trained.sum()),
        },
        "dropped": int((bad & stays[owner]).sum()),
        "rejected": np.flatnonzero(~stays),
    }
