"""Things that users choose by a name of a fixed set."""

from collections.abc import Mapping
from difflib import get_close_matches

from megatron_mm1.errors import ConfigError


def chosen[Thing](kind: str, name: str, among: Mapping[str, Thing]) -> Thing:
    """What `name` stands for.

    Args:
        kind: what is being chosen ("preset", ..), for the error message.

    Raises:
        ConfigError: it stands for nothing.
    """
    if name not in among:
        nearest = get_close_matches(name, among, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError([f"unknown {kind} {name!r}: use one of {', '.join(among)}{hint}"])
    return among[name]
