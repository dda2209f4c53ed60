"""A configuration from a preset, YAML files and the command line, in that order of precedence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_mm1.config.command_line import build_parser, parse_arguments, set_override
from megatron_mm1.config.keys import all_keys, element_class, group_class
from megatron_mm1.config.presets import preset
from megatron_mm1.config.recipes import apply_recipe
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.config.serialization import from_dict, from_yaml, parse_yaml, to_dict, to_yaml
from megatron_mm1.errors import ConfigError

_Files = Sequence[tuple[str, dict[str, Any]]]
"""Path and content."""

__all__ = ["from_dict", "from_yaml", "load_config", "to_dict", "to_yaml"]


def load_config(argv: Sequence[str]) -> MM1Config:
    """The configuration a command line asks for.

        --preset NAME           start from a preset (a file's top-level key `preset` does the same)
        --recipe NAME           change the preset, or without one the first file, as a recipe says (or a file's key)
        --config FILE           then merge a YAML file, whole or partial; repeatable
        --KEY VALUE             then set single keys
        --print_config, --help  print and exit with 0

    Raises:
        ConfigError: unknown or ambiguous keys, values of a wrong type, unreadable files.
        SystemExit: after printing the configuration or the help.
    """
    options, overrides = parse_arguments(argv)
    files = [(path, _read(path)) for path in options.config]
    base_name, recipe = _one_name("preset", options.preset, files), _one_name("recipe", options.recipe, files)
    base = None if base_name is None else preset(base_name)
    if options.help:
        build_parser(defaults=base).print_help()
        raise SystemExit(0)
    if base is None and not files:
        raise ConfigError(["no configuration named: start from a preset (--preset mm1-tiny) or a file (--config FILE)"])

    if recipe is not None:
        if base is None:
            (_, whole), *files = files
            base = from_dict(whole)
        base = apply_recipe(recipe, base)
    values = {} if base is None else to_dict(base)
    for _, overlay in files:
        values = _merge(values, overlay)
    # A group given whole (--model.moe '{..}') comes before single keys of it.
    for path, text in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        set_override(values, path, _parse_group(path, text))
    config = from_dict(values)
    if options.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"), origin=path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read the configuration file {path}: {error}"]) from error


def _one_name(key: str, option: str | None, files: _Files) -> str | None:
    """The one preset or recipe that is named, taking the key out of the files; an option outranks the files."""
    in_files = {path: str(values.pop(key)) for path, values in files if key in values}
    if option is None and len(set(in_files.values())) > 1:
        claims = ", ".join(f"{path} says {name}" for path, name in in_files.items())
        raise ConfigError([f"the files start from different {key}s ({claims}): choose one with --{key}"])
    return option or next(iter(in_files.values()), None)


def _merge(base: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`overlay` over `base`: mappings key by key, everything else (lists too) replaced."""
    merged = dict(base)
    for name, value in overlay.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _parse_group(path: str, text: str) -> Any:
    """The text of an option as YAML where its key holds a group or a list of them; plain values are converted later."""
    annotation = all_keys()[path].annotation
    if group_class(annotation) is None and element_class(annotation) is None:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"--{path} {text!r} is not YAML: {' '.join(str(error).split())}"]) from error
