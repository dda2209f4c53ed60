"""Fields of records: what text and JSON must be to be used."""

import json
import re
from typing import Any

from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.records import Reason

_STRAY_BYTES = re.compile("[\udc80-\udcff]")


def clean_text(text: str) -> str:
    """`text` itself where it can be used.

    Raises:
        RejectRecord: it is blank, has NUL bytes or was not valid UTF-8.
    """
    if not text.strip():
        raise RejectRecord(Reason.BLANK_TEXT)
    if "\0" in text:
        raise RejectRecord(Reason.NUL_BYTES, shortened(text))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectRecord(Reason.NOT_UTF8, shortened(text)) from None
    return text


def decode_text(data: bytes) -> str:
    """Clean text of UTF-8 bytes; a byte order mark is left out.

    Raises:
        RejectRecord: see `clean_text`.
    """
    return clean_text(data.decode("utf-8-sig", "surrogateescape"))


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`; bytes that are not UTF-8 stay as lone surrogates, which `clean_text` refuses.

    Raises:
        RejectRecord: not JSON.
    """
    try:
        return json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise RejectRecord(Reason.NOT_JSON, f"{error}: {shortened(data.decode(errors='replace'))}") from None


def mapping(value: Any) -> dict[str, Any]:
    """`value`, which must be a JSON object.

    Raises:
        RejectRecord: it is something else.
    """
    if not isinstance(value, dict):
        raise RejectRecord(Reason.WRONG_FIELDS, f"a {type(value).__name__} where an object was expected")
    return value


def text_field(row: Any, name: str) -> str:
    """A text that is there and clean.

    Raises:
        RejectRecord: see `clean_text`; or the field is missing or no text.
    """
    value = mapping(row).get(name)
    if isinstance(value, bytes):
        return decode_text(value)
    if not isinstance(value, str):
        raise RejectRecord(Reason.WRONG_FIELDS, f"no text field {name!r}")
    return clean_text(value)


def list_field(row: Any, name: str) -> list[Any]:
    """A list that is there.

    Raises:
        RejectRecord: it is missing or no list.
    """
    value = mapping(row).get(name)
    if not isinstance(value, list):
        raise RejectRecord(Reason.WRONG_FIELDS, f"no list field {name!r}")
    return value


def shortened(text: str) -> str:
    """The beginning of `text`, for a message."""
    text = _STRAY_BYTES.sub("\N{REPLACEMENT CHARACTER}", text[:80])
    return ascii(text)
