"""One JSON list, read item by item: instruction data is kept so, in files of gigabytes."""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from megatron_mm1.data.readers.base import MAX_RECORD, Row, Shard
from megatron_mm1.data.records import Reason, Rejected

_CHUNK = 4 << 20
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


class _Damage(ValueError):
    """The text does not go on as a list does."""


class _Text:
    """Text that is read as far as it is needed; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.position, self.ended = "", 0, False

    def more(self) -> None:
        """Drop what was used and read as much as is left, so that a long item is parsed few times."""
        left = self.text[self.position :]
        if len(left) > MAX_RECORD:
            raise _Damage(Reason.RECORD_TOO_LARGE)
        data = self._file.read(max(_CHUNK, len(left)))
        self.ended = not data
        self.text, self.position = left + self._decode(data, final=self.ended), 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if self.ended:
                return ""
            self.more()

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`."""
        character = self.peek()
        if not character or character not in expected:
            raise _Damage(f"{character or 'the end of the file'!r} where one of {expected!r} was expected")
        self.position += 1
        return character

    def item(self) -> object:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                if self.ended or isinstance(error, RecursionError):
                    raise _Damage(str(error)) from None
            else:
                if end < len(self.text) or self.ended:  # or a number may go on
                    self.position = end
                    return value
            self.more()


def read_list(shard: Shard) -> Iterator[Row | Rejected]:
    """Items of the list with their number as key; where the file is damaged the rest is one `Rejected`."""
    number = 0
    try:
        with shard.path.open("rb") as file:
            text = _Text(file)
            if text.peek() == "\N{BYTE ORDER MARK}":
                text.position += 1
            if not text.peek():
                yield Rejected(shard.name, Reason.EMPTY_FILE)
                return
            text.take("[")
            if text.peek() == "]":
                yield Rejected(shard.name, Reason.EMPTY_FILE, "an empty list")
                text.take("]")
            else:
                more = True
                while more:
                    yield Row(f"{shard.name}#{number}", text.item())
                    number += 1
                    more = text.take(",]") == ","
            if text.peek():
                raise _Damage("text after the list")
    except (OSError, _Damage) as error:
        reason = Reason.TRUNCATED_FILE if number else Reason.NOT_JSON
        yield Rejected(f"{shard.name}#{number}", reason, str(error))
