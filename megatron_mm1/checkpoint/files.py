"""Folders that appear whole or not at all, and errors of the disk in words."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mm1.errors import UserError


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends, and is removed if the block fails.

    What is in it is to be synced by the block; the folder itself is synced here.

    Raises:
        UserError: `folder` is there, not empty and not to be overwritten; or the disk refuses.
    """
    refuse_existing(folder, overwrite=overwrite)
    folder = folder.absolute()
    partial, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "replaced"))
    with disk_errors(folder), removed_on_failure(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        exchange(partial, folder, replaced=replaced)
    shutil.rmtree(replaced, ignore_errors=True)


def exchange(partial: Path, folder: Path, *, replaced: Path) -> None:
    """Put a folder that is complete in the place of one that may be there, which is kept as `replaced`."""
    sync(partial)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Raises UserError where a result would replace what is there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name another folder to write")
    if folder.is_dir() and any(not _is_leftover(path) for path in folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is there and not empty: name another folder, or replace it with --overwrite")


def _is_leftover(path: Path) -> bool:
    """Whether a writer that was killed left this behind."""
    return path.name.startswith(".") and path.suffix in (".partial", ".replaced")


@contextmanager
def removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, or one that is not ours to write on, into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's entries, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
