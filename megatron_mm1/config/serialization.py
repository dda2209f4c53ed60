"""Configurations as plain dicts and YAML, and back, strictly: whatever does not fit is named, all of it at once."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from megatron_mm1.config.keys import (
    all_keys,
    describe_type,
    element_class,
    field_types,
    group_class,
    is_nullable,
    is_required,
    refusal,
)
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.errors import ConfigError


def to_dict(config: MM1Config) -> dict[str, Any]:
    """Nested dicts, lists and scalars, in the schema's order."""
    return _plain(asdict(config))


def from_dict(values: Mapping[str, Any]) -> MM1Config:
    """The inverse of `to_dict`. A value may also be its text, as on a command line ("1e-4" for a float).

    Raises:
        ConfigError: every unknown key (with the nearest valid one), missing key and value of a wrong type.
    """
    problems: list[str] = []
    config = _build(MM1Config, values, "", problems)
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: MM1Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> MM1Config:
    """The inverse of `to_yaml`.

    Raises:
        ConfigError: the text is no YAML, or as `from_dict`.
    """
    return from_dict(parse_yaml(text, origin="configuration"))


def parse_yaml(text: str, *, origin: str) -> dict[str, Any]:
    """A YAML mapping as a dict.

    Raises:
        ConfigError: it is no YAML, or no mapping; `origin` (a file name) and the line are named.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{origin} is not YAML: {' '.join(str(error).split())}"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{origin} holds {_show(values)}, not a mapping of keys to values"])
    return values


def nearest_key(path: str, choices: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to `path`, by its whole or its last name; empty where none is.

    For what is left out on purpose it says why.
    """
    last = path.rpartition(".")[2]
    if reason := refusal(last):
        return reason
    by_last = {choice.rpartition(".")[2]: choice for choice in choices}
    near = get_close_matches(path, choices, n=1, cutoff=0.8)
    near = near or [by_last[name] for name in get_close_matches(last, by_last, n=1, cutoff=0.7)]
    near = near or get_close_matches(path, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _build(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """An instance of dataclass `cls`, or None after adding to `problems`."""
    where = prefix.rstrip(".")
    if not isinstance(values, Mapping):
        problems.append(f"{where} is {_show(values)}, which is not {describe_type(cls)}")
        return None
    types = field_types(cls)
    before = len(problems)
    # A key in a list (data.sources[0].wieght) is near only to its siblings; elsewhere any key may be meant.
    choices = [prefix + name for name in types] if "[" in prefix else [*all_keys(), *(prefix + name for name in types)]
    for name in values:
        if name not in types:
            problems.append(f"unknown key {prefix + str(name)!r}{nearest_key(prefix + str(name), choices)}")
    arguments = {}
    for name, annotation in types.items():
        if name in values:
            arguments[name] = _convert(annotation, values[name], prefix + name, problems)
        elif is_required(cls, name):
            problems.append(f"{prefix + name} is missing: it has no default")
    return cls(**arguments) if len(problems) == before else None


def _convert(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    group, element = group_class(annotation), element_class(annotation)
    if group is not None:
        return None if value is None and is_nullable(annotation) else _build(group, value, f"{path}.", problems)
    if element is not None:
        if not isinstance(value, list | tuple):
            problems.append(f"{path} is {_show(value)}, which is not {describe_type(annotation)}")
            return None
        return tuple(_build(element, item, f"{path}[{index}].", problems) for index, item in enumerate(value))
    try:
        return _leaf_parser(annotation).parse_object({"value": value}).value
    except argparse.ArgumentError:
        reason = refusal(value) if isinstance(value, str) else ""
        problems.append(f"{path} is {_show(value)}, which is not {describe_type(annotation)}{reason}")
        return None


@cache
def _leaf_parser(annotation: Any) -> ArgumentParser:
    """jsonargparse converts and checks one value of this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation, required=not is_nullable(annotation))
    return parser


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
