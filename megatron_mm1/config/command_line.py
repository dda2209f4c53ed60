"""The options of `mm1 train`: one for each key of the schema."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mm1.config.keys import Key, all_keys, group_class, value_at
from megatron_mm1.config.presets import PRESETS
from megatron_mm1.config.recipes import RECIPES
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.config.serialization import nearest_key
from megatron_mm1.errors import ConfigError

_FIXED = ("preset", "recipe", "config", "print_config", "help")
"""Options that are no keys."""
_EPILOG = (
    "Dashes and underscores both parse, and a name that only one key has needs no prefix: "
    "--tensor-model-parallel-size 2. Files (--config) override the preset, later files earlier ones, "
    "and options all of them."
)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Splits a command line into the fixed options (`_FIXED`) and overrides by dotted key.

    Raises:
        ConfigError: every unknown or ambiguous option.
    """
    parser = build_parser(defaults=None)
    problems: list[str] = []
    try:
        known, unknown = parser.parse_known_args([_canonical(argument, problems) for argument in argv])
    except argparse.ArgumentError as error:
        raise ConfigError([*problems, str(error)]) from error
    # A value that follows an unknown option is no problem of its own.
    problems += [_unknown(argument) for argument in unknown if argument.startswith("--")]
    if unknown and not problems:
        problems.append(f"{unknown[0]!r} belongs to no option")
    if problems:
        raise ConfigError(problems)
    fixed = argparse.Namespace(**{name: getattr(known, name) for name in _FIXED})
    return fixed, {path: value for path, value in vars(known).items() if path in all_keys()}


def build_parser(*, defaults: MM1Config | None) -> argparse.ArgumentParser:
    """The parser; `defaults` is what the help shows beside each option. Values stay text: the schema converts them."""
    parser = argparse.ArgumentParser(
        prog="mm1 train",
        usage="mm1 train [--preset NAME] [--recipe NAME] [--config FILE ...] [--KEY VALUE ...]",
        epilog=_EPILOG,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="Show this help and exit.")
    parser.add_argument("--preset", metavar="NAME", help=f"Start from one of {', '.join(PRESETS)}.")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"Change the preset, or without one the first file: {', '.join(RECIPES)}."
    )
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help="YAML file; may be repeated.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for key in all_keys().values():
        title = key.path.rpartition(".")[0]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if key.annotation is bool else {}
        groups[title].add_argument(
            f"--{key.path}",
            dest=key.path,
            default=argparse.SUPPRESS,
            metavar=key.type_name.replace(" or ", "|") if group_class(key.annotation) is None else "MAPPING|null",
            help=_help(key, defaults),
            **flag,
        )
    return parser


def _help(key: Key, defaults: MM1Config | None) -> str:
    value = None if defaults is None else value_at(defaults, key.path)
    shown = "" if defaults is None or group_class(key.annotation) else f"({'null' if value is None else value})"
    if isinstance(value, tuple):
        shown = f"({', '.join(str(getattr(item, 'name', item)) for item in value)})"
    return f"{key.doc} {shown}".strip().replace("%", "%%")


def _canonical(argument: str, problems: list[str]) -> str:
    """An option with underscores and its full path; anything else as it is."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    matches = [path for path in all_keys() if path.rpartition(".")[2] == name]
    if name in _FIXED or name in all_keys() or not matches:
        return f"--{name}{equals}{value}"
    if len(matches) > 1:
        problems.append(f"--{name} is ambiguous: use one of {', '.join('--' + match for match in matches)}")
    return f"--{matches[0]}{equals}{value}"


def _unknown(argument: str) -> str:
    name = argument[2:].partition("=")[0]
    return f"unknown option --{name}{nearest_key(name, [*_FIXED, *all_keys()])}"


def set_override(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets `values[a][b][c] = value` for the path a.b.c; a group that is null or absent becomes a mapping."""
    *groups, last = path.split(".")
    for name in groups:
        if not isinstance(values.get(name), Mapping):
            values[name] = {}
        values = values[name]
    values[last] = value
