"""A launch script's options, and what becomes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mm1.config.command_line import set_override
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.config.serialization import from_dict
from megatron_mm1.errors import UserError


@dataclass
class Migration:
    """A run of theirs as one of ours.

    Attributes:
        values: of our configuration, nested, those alone that the script or Megatron-LM's defaults decide.
        unmapped: what has no counterpart, and why.
        different: what has one that is not the same, and how.
    """

    values: dict[str, Any] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        set_override(self.values, key, value)

    def config(self) -> MM1Config:
        """Raises `ConfigError` where the script leaves out what has no default."""
        return from_dict(self.values)


def options_of(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Option without its dashes -> its values; of an option that comes twice the last, as argparse does."""
    options: dict[str, list[str]] = {}
    name = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = [value] if equals else []
        elif name is not None:
            options[name].append(word)
    return options


@dataclass(frozen=True)
class Theirs:
    options: Mapping[str, list[str]]
    given: Mapping[str, list[str]]

    def has(self, name: str) -> bool:
        return name in self.options

    def text(self, name: str) -> str | None:
        """The option's value; None where it is not given and has no default that differs from ours."""
        if name not in self.options:
            return None
        if len(self.options[name]) != 1:
            raise UserError(f"--{name} takes one value, and the script gives it {len(self.options[name])}")
        return self.options[name][0]

    def number(self, name: str) -> float | None:
        text = self.text(name)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise UserError(f"--{name} {text} is no number") from None

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        return None if number is None else int(number)
