"""Reading benchmark files: JSON, images by name, and records that may be unusable."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import list_field, mapping, text_field
from megatron_mm1.data.records import Reason, Rejected
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.items import ImageFile, Item

Records = Iterator[Item | Rejected]


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: it is missing, or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}: docs/evaluation.md says what files a task reads") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON file that can be read ({error}): download it again") from None


def read_list(path: Path, field: str | None = None) -> list[Any]:
    """The list in a JSON file, or in a field of the object in it.

    Raises:
        UserError: see `read_json`; or there is no list.
    """
    value = read_json(path)
    rows = value if field is None else value.get(field) if isinstance(value, dict) else None
    if not isinstance(rows, list):
        where = "a list" if field is None else f"an object with a list {field!r}"
        raise UserError(f"{path} is not {where}: is it the benchmark's own file?")
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without white space around them.

    Raises:
        UserError: it is missing, or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): docs/evaluation.md says what files a task reads") from None
    return [line.strip() for line in lines if line.strip()]


def made(rows: Iterable[Any], make: Callable[[Any], Item], *, file: Path) -> Records:
    """`make(row)` of every row, or why it raised `RejectRecord`.

    Args:
        file: where the rows are from; names rejected ones, with their number.
    """
    for number, row in enumerate(rows):
        try:
            yield make(row)
        except RejectRecord as error:
            yield Rejected(f"{file.name}:{number}", error.reason, error.detail)


class ImageFolder:
    """Image files below a folder; each subfolder is listed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[Path, frozenset[str]] = {}

    def find(self, relative: str) -> ImageFile:
        """The image at a path below the folder.

        Raises:
            RejectRecord: it is not there, or the path leaves the folder.
        """
        inside = PurePosixPath(relative)
        if inside.is_absolute() or ".." in inside.parts:
            raise RejectRecord(Reason.OUTSIDE_FOLDER, ascii(relative))
        path = self._root / inside
        if path.name not in self._listed(path.parent):
            raise RejectRecord(Reason.MISSING_IMAGE, f"{path}: put it there")
        return ImageFile(path)

    def _listed(self, folder: Path) -> frozenset[str]:
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]


def identifier(row: Any, name: str) -> str:
    """An id that is a number or a text.

    Raises:
        RejectRecord: it is missing or something else.
    """
    value = mapping(row).get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise RejectRecord(Reason.WRONG_FIELDS, f"no id {name!r}")
    return str(value)


def index_field(row: Any, name: str, *, below: int) -> int:
    """An index into a list of `below` entries.

    Raises:
        RejectRecord: it is missing, or outside.
    """
    value = mapping(row).get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise RejectRecord(Reason.WRONG_FIELDS, f"no index {name!r} below {below}")
    return value


def texts_field(row: Any, name: str) -> tuple[str, ...]:
    """A list of texts, not empty.

    Raises:
        RejectRecord: it is something else.
    """
    return tuple(_text(value, name) for value in _filled(list_field(row, name), name))


def texts_of(row: Any, name: str, inner: str) -> tuple[str, ...]:
    """The text `inner` of each object in a list, not empty.

    Raises:
        RejectRecord: it is something else.
    """
    return tuple(text_field(value, inner).strip() for value in _filled(list_field(row, name), name))


def most_common(texts: Sequence[str]) -> str:
    """The text that most give; of equally common ones, the first."""
    return Counter(texts).most_common(1)[0][0]


def _filled(values: list[Any], name: str) -> list[Any]:
    if not values:
        raise RejectRecord(Reason.WRONG_FIELDS, f"empty list {name!r}")
    return values


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RejectRecord(Reason.WRONG_FIELDS, f"a {type(value).__name__} in {name!r}")
    return value.strip()
