"""Options of readers from the command line: `NAME=VALUE` against the keyword-only parameters of the reader's class."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_mm1.errors import UserError

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_options(reader: type, name: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of `reader` from texts.

    Args:
        name: what the user calls the reader, for messages.

    Raises:
        UserError: there is no such option, a value does not fit its annotation, or an option that has no default is
            missing.
    """
    parameters = {
        parameter.name: parameter
        for parameter in inspect.signature(reader).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    hints = get_type_hints(reader.__init__)  # type: ignore[misc]
    available = "; ".join(_described(parameter, hints.get(parameter.name, str)) for parameter in parameters.values())
    explanation = f"its options are {available}" if parameters else "it has no options"
    values = {}
    for option, text in options.items():
        if option not in parameters:
            raise UserError(f"reader {name!r} has no option {option!r}: {explanation}")
        try:
            values[option] = _parse(text, hints.get(option, str))
        except ValueError:
            raise UserError(f"option {option}={text!r} of reader {name!r} cannot be used: {explanation}") from None
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in values:
            raise UserError(f"reader {name!r} needs the option {parameter.name!r}: {explanation}")
    return values


def _alternatives(hint: Any) -> list[Any]:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if member is not NoneType]


def _parse(text: str, hint: Any) -> Any:
    """`text` as the first alternative of `hint` that it fits.

    Raises:
        ValueError: it fits none.
    """
    for kind in _alternatives(hint):
        try:
            return _parse_as(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_as(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    if kind in (str, int, float, Path):
        return kind(text)
    raise TypeError(f"a reader's option cannot be a {kind}: use str, int, float, bool, Path or Literal")


def _described(parameter: inspect.Parameter, hint: Any) -> str:
    kinds = []
    for kind in _alternatives(hint):
        kinds += list(get_args(kind)) if get_origin(kind) is Literal else [getattr(kind, "__name__", str(kind))]
    default = "required" if parameter.default is parameter.empty else f"default {parameter.default}"
    return f"{parameter.name} ({' or '.join(kinds)}; {default})"
