"""`mm1 config from-megatron`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_mm1.arguments import add_command
from megatron_mm1.config.derived import smallest_world_size
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.migration.convert import Migration, migrate
from megatron_mm1.migration.options import table
from megatron_mm1.migration.shell import UNKNOWN, read_script


def from_megatron_main(args: argparse.Namespace) -> None:
    """Prints the YAML, or writes it, and then prints what could not be mapped.

    Raises:
        UserError: the script cannot be read, or what it says makes no configuration.
    """
    if args.table:
        print(table())
        return
    if args.script is None:
        raise UserError("name the script to convert, or use --table")
    try:
        text = args.script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {args.script}: {error}") from None
    script = read_script(text, program=args.program, variables=dict(_variable(each) for each in args.set))
    migration = migrate(script.arguments)
    migration.unmapped += [f"${name} is not set in the script: give it with --set {name}=.." for name in script.unset]
    migration.unmapped += script.unread
    content = as_yaml(migration, origin=str(args.script))
    if args.output is None:
        print(content, end="")
        return
    try:
        args.output.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from None
    print(_notes(migration, prefix=""), end="")
    print(f"{args.output}: mm1 train --config {args.output}")


def as_yaml(migration: Migration, *, origin: str) -> str:
    """Our configuration, with what it lacks and what in it is not the same as comments in front.

    Raises:
        ConfigError: required settings are missing, or values do not fit.
    """
    problems = ""
    config = migration.config()
    try:
        validate(config, world_size=smallest_world_size(config.parallel))
    except ConfigError as error:
        problems = "".join(f"# - {problem}\n" for problem in error.problems)
        problems = f"# It cannot run as it is:\n{problems}#\n"
    head = f"# From {origin}, a script of Megatron-LM's multimodal example.\n#\n"
    settings = _chosen(to_dict(config), migration.values)
    return head + problems + _notes(migration, prefix="# ") + yaml.safe_dump(settings, sort_keys=False)


def _chosen(whole: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole configuration what `values` set, with the types and in the order that the schema has."""
    return {
        name: _chosen(whole[name], values[name]) if isinstance(values[name], Mapping) else whole[name]
        for name in whole
        if name in values
    }


def _notes(migration: Migration, *, prefix: str) -> str:
    lines = []
    for title, notes in (("Not mapped:", migration.unmapped), ("Not quite the same:", migration.different)):
        if notes:
            lines += [title, *(f"- {note}" for note in notes), ""]
    return "".join(f"{prefix}{line}".rstrip() + "\n" for line in lines).replace(UNKNOWN, "(unknown)")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--set {text}: write NAME=VALUE")
    return name, value


def add_from_megatron(config: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        config,
        "from-megatron",
        from_megatron_main,
        "write our configuration for a training script of Megatron-LM's example",
    )
    parser.add_argument("script", nargs="?", type=Path, metavar="RUN.SH", help="the bash script that starts training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the YAML there instead of printing it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the environment; repeatable"
    )
    parser.add_argument("--program", default="train.py", metavar="NAME", help="the training program (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what becomes of every option instead")
