"""`mm1 data prepare`: a data set as people keep it -> the folder that training reads (data/prepared.py).

The input is cut into parts of fixed size. One process writes each, and it is there when it is whole: so the result does
not depend on the number of processes, and a preparation that was killed goes on with the parts that are missing. All
this happens in the folder `.NAME.preparing` beside the output, which takes the output's name at the end.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_mm1.data.files import replace_file
from megatron_mm1.data.prepare_processes import Recipe, write_in_processes
from megatron_mm1.data.prepared import MANIFEST, QUARANTINE, Manifest, Part, part_name
from megatron_mm1.data.preparing import Checks, Summary, write_part
from megatron_mm1.data.readers import Reader, Shard
from megatron_mm1.data.records import Document, Reason, Rejected
from megatron_mm1.data.repeats import FREQUENT, drop_repeats
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError

PART_SIZE = 256 << 20
MOST_PARTS = 2048
MAX_BAD_FRACTION = 0.1
FILTERED = frozenset((Reason.NO_IMAGES, Reason.TOO_MANY_IMAGES, Reason.REPEATED_IN_CORPUS))
"""Reasons for which the filters reject sound records; those with any other are bad."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ORIGIN = "origin.json"


class _Documents(Reader):
    """Documents at hand, as one shard."""

    def __init__(self, documents: Iterable[Document | Rejected]) -> None:
        self._documents = documents

    def shards(self) -> list[Shard]:
        return [Shard("documents", Path(), 1)]

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        yield from self._documents


def prepare(
    documents: Iterable[Document | Rejected],
    *,
    tokenizer: Tokenizer,
    output: Path,
    checks: Checks | None = None,
    origin: Mapping[str, Any] | None = None,
    part_size: int | None = None,
    max_bad_fraction: float = 1.0,
) -> Manifest:
    """Write `documents` (a reader, or any other iterable) to the new folder `output`, in this process.

    Args:
        checks: None: the reader's own filters, every image decoded.
        origin: what the documents were made from; an `output` of the same origin and tokenizer is kept as it is.
        part_size: bytes of input to a part; None: `PART_SIZE`, or more where that would make over `MOST_PARTS`.
        max_bad_fraction: of records that are damaged or otherwise unusable.

    Raises:
        UserError: `output` was made from something else, too many records are bad, none is left, or the disk is full.
    """
    reader = documents if isinstance(documents, Reader) else _Documents(documents)
    checks = checks or Checks(filters=reader.filters)

    def write(work: Path, parts: Mapping[int, Sequence[Shard]], done: Callable[[int], None]) -> None:
        for number, shards in parts.items():
            write_part(work / part_name(number), reader, shards, tokenizer=tokenizer, checks=checks, done=done)

    return _prepare(
        reader.shards,
        write,
        tokenizer=tokenizer,
        output=output,
        checks=checks,
        origin=dict(origin or {}),
        part_size=part_size,
        max_bad_fraction=max_bad_fraction,
    )


def prepare_in_parallel(
    recipe: Recipe,
    *,
    output: Path,
    workers: int,
    checks: Checks | None = None,
    part_size: int | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    progress: bool = False,
) -> Manifest:
    """`prepare` by `workers` processes; see there."""
    reader, tokenizer = recipe.open_reader(), open_tokenizer(recipe.tokenizer)
    checks = checks or Checks(filters=reader.filters)
    origin = {"reader": recipe.reader, "options": dict(recipe.options), "input": input_fingerprint(recipe.input)}

    def write(work: Path, parts: Mapping[int, Sequence[Shard]], done: Callable[[int], None]) -> None:
        write_in_processes(recipe, checks, work, parts, workers=workers, done=done)

    return _prepare(
        reader.shards,
        write,
        tokenizer=tokenizer,
        output=output,
        checks=checks,
        origin=origin,
        part_size=part_size,
        max_bad_fraction=max_bad_fraction,
        progress=progress,
    )


_WriteParts = Callable[[Path, Mapping[int, Sequence[Shard]], Callable[[int], None]], None]
"""Write parts, by number the shards of each, into a folder, and tell how many bytes have been read."""


def _prepare(
    shards: Callable[[], Sequence[Shard]],
    write: _WriteParts,
    *,
    tokenizer: Tokenizer,
    output: Path,
    checks: Checks,
    origin: dict[str, Any],
    part_size: int | None,
    max_bad_fraction: float,
    progress: bool = False,
) -> Manifest:
    output = output.absolute()
    origin = origin | {"checks": asdict(checks), "part_size": part_size}
    origin = json.loads(json.dumps(origin, default=str))
    if output.exists():
        return _existing(output, tokenizer=tokenizer, origin=origin)
    work = output.with_name(f".{output.name}.preparing")
    groups = _groups(shards(), part_size)
    try:
        with _claimed(work, {"origin": origin, "tokenizer": tokenizer.fingerprint}):
            missing = {number: group for number, group in enumerate(groups) if not (work / part_name(number)).is_dir()}
            total, left = (sum(shard.size for group in some for shard in group) for some in (groups, missing.values()))
            with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, disable=not progress) as bar:

                def done(size: int) -> None:
                    bar.update(size)

                write(work, missing, done)
            parts = [work / part_name(number) for number in range(len(groups))]
            if checks.filters is not None and checks.filters.max_repeats is not None:
                drop_repeats(work, parts, checks.filters)
            manifest = _manifest(parts, tokenizer=tokenizer, origin=origin)
            _check_bad(manifest, max_bad_fraction, work)
            replace_file(work / MANIFEST, manifest.to_json().encode())
            os.rename(work, output)
    except OSError as error:
        if error.errno not in _FULL:
            raise UserError(
                f"preparing {output} stopped: {error}; run the same command again when that is mended: it goes on with "
                f"what is in {work}"
            ) from None
        raise UserError(
            f"cannot write {output}: {error.strerror or error}: nothing but {work} was written; free some space and "
            "run the same command again, which goes on with what is there"
        ) from None
    _tidy(output)
    return manifest


def _tidy(output: Path) -> None:
    """Remove what only the work folder needs; after the renaming, so that the folder is claimed until then."""
    for name in (_ORIGIN, FREQUENT):
        (output / name).unlink(missing_ok=True)


def _groups(shards: Sequence[Shard], part_size: int | None) -> list[list[Shard]]:
    """Shards of each part: consecutive ones of `part_size` bytes together at least, but the last."""
    size = part_size or max(PART_SIZE, sum(shard.size for shard in shards) // MOST_PARTS)
    groups: list[list[Shard]] = [[]]
    filled = 0
    for shard in shards:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += shard.size
    return groups


@contextmanager
def _claimed(work: Path, claim: Mapping[str, Any]) -> Iterator[None]:
    """The work folder, for this process alone; one that is there must be of the same claim.

    Raises:
        UserError: another process is at work in it, or it holds the beginning of something else.
    """
    work.mkdir(parents=True, exist_ok=True)
    directory = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing in {work}: wait for it, or stop it") from None
        file = work / _ORIGIN
        if file.is_file() and json.loads(file.read_text()) != claim:
            raise UserError(
                f"{work} holds an unfinished preparation of another input, reader, tokenizer or options: finish it "
                "with those, remove it, or choose another output"
            )
        replace_file(file, json.dumps(claim).encode())
        for leftover in work.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(directory)


def _manifest(parts: Sequence[Path], *, tokenizer: Tokenizer, origin: Mapping[str, Any]) -> Manifest:
    summaries = [Summary.load(part) for part in parts]
    totals, rejected, dropped = (_total(summaries, name) for name in ("counts", "rejected", "dropped"))
    counts = {name: totals[name] for name in ("documents", "images", "tokens", "trained_tokens")}
    read, seen = sum(summary.read for summary in summaries), sum(summary.images_seen for summary in summaries)
    if not counts["documents"]:
        raise UserError(f"no usable document for {parts[0].parent}: {read} records read, {dict(rejected)}")
    return Manifest(
        counts=counts,
        records={"read": read, "written": counts["documents"], "rejected": dict(sorted(rejected.items()))},
        images={"seen": seen, "written": counts["images"], "dropped": dict(sorted(dropped.items()))},
        tokenizer=tokenizer.fingerprint,
        origin=origin,
        parts=tuple(
            Part(part.name, summary.counts["documents"], summary.counts["images"], dict(sorted(summary.files.items())))
            for part, summary in zip(parts, summaries, strict=True)
        ),
    )


def _total(summaries: Sequence[Summary], name: str) -> Counter[str]:
    return sum((getattr(summary, name) for summary in summaries), Counter())


def _check_bad(manifest: Manifest, max_bad_fraction: float, work: Path) -> None:
    rejected, read = manifest.records["rejected"], manifest.records["read"]
    bad = sum(count for reason, count in rejected.items() if reason not in FILTERED)
    if bad > max_bad_fraction * read:
        listed = ", ".join(f"{reason}: {count:,}" for reason, count in rejected.items())
        raise UserError(
            f"{bad:,} of {read:,} records are bad ({listed}), more than --max-bad-fraction {max_bad_fraction}: see "
            f"{work}/part-*/{QUARANTINE}; mend the data, or run again with a larger fraction, which takes what is there"
        )


def _existing(output: Path, *, tokenizer: Tokenizer, origin: Mapping[str, Any]) -> Manifest:
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} exists and is no prepared data set: choose another output")
    try:
        manifest = Manifest.from_json((output / MANIFEST).read_text(), origin=str(output / MANIFEST))
    except UserError as error:
        raise UserError(f"{error}, after removing {output}") from None
    if (manifest.tokenizer, manifest.origin) != (tokenizer.fingerprint, origin):
        raise UserError(
            f"{output} holds data prepared from another input, reader, options or tokenizer: remove it or choose "
            "another output"
        )
    _tidy(output)
    return manifest


def input_fingerprint(path: Path) -> str:
    """SHA-256 over name, size and modification time of every file below `path`."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            digest.update(
                f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="replace")
            )
    return digest.hexdigest()


def prepare_main(args: Namespace) -> Manifest:
    """`mm1 data prepare` with its parsed arguments (cli.py)."""
    recipe = Recipe(
        reader=args.reader,
        input=Path(args.input),
        options=tuple(sorted(_option(text) for text in args.option)),
        tokenizer=Path(args.tokenizer),
    )
    reader = recipe.open_reader()
    filters = None if args.no_filters else reader.filters
    if args.max_repeats is not None:
        if filters is None:
            raise UserError(f"--max-repeats is one of the filters, and reader {args.reader!r} has none")
        filters = replace(filters, max_repeats=args.max_repeats or None)
    return prepare_in_parallel(
        recipe,
        output=Path(args.output),
        workers=args.workers or os.cpu_count() or 1,
        checks=Checks(filters=filters, image_check=args.image_check),
        part_size=args.part_size,
        max_bad_fraction=args.max_bad_fraction,
        progress=sys.stderr.isatty(),
    )


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--option {text!r} is not NAME=VALUE")
    return name, value
