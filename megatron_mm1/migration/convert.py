"""The settings of a launch script of Megatron-LM's multimodal example as those of an MM1 run."""

from collections.abc import Sequence

from megatron_mm1.migration.model_settings import decoder, experts, images, vision
from megatron_mm1.migration.options import ALL, DEFAULTS
from megatron_mm1.migration.run_settings import layout, lengths, schedule, start
from megatron_mm1.migration.theirs import Migration, Theirs, options_of


def migrate(arguments: Sequence[str]) -> Migration:
    """Maps a training program's arguments.

    Raises:
        UserError: an option lacks its value, or a number is none.
    """
    given = options_of(arguments)
    theirs = Theirs({name: [value] for name, value in DEFAULTS.items()} | given, given)
    migration = Migration()
    migration.set("name", "from-megatron")
    _plain_options(theirs, migration)
    for part in (decoder, experts, vision, images, lengths, schedule, layout, start):
        part(theirs, migration)
    return migration


def _plain_options(theirs: Theirs, migration: Migration) -> None:
    """Everything that one option decides."""
    for name in theirs.options:
        option = ALL.get(name)
        said = " ".join([f"--{name}", *theirs.options[name]])
        if option is None:
            migration.unmapped.append(f"{said}: not an option that this converter knows")
        elif option.fate == "none":
            migration.unmapped.append(f"{said}: {option.note}")
        elif option.fate == "implied" and option.accepted and theirs.text(name) not in option.accepted:
            default = "" if name in theirs.given else " (Megatron-LM's default)"
            migration.unmapped.append(f"{said}{default}: {option.note}")
        elif option.fate == "key":
            migration.set(option.ours, theirs.text(name))
            if option.note and name in theirs.given:
                migration.different.append(f"{said}: {option.note}")
        elif option.fate == "flag":
            migration.set(option.ours, option.value)
