"""Extension points: a component is chosen by a built-in name or by the import path of a class in the user's own
package.
"""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from megatron_mm1.errors import UserError


def resolve(kind: str, name: str, builtin: Mapping[str, Any]) -> Any:
    """The object called `name`: a key of `builtin`, or an import path `package.module.Name`.

    Args:
        kind: what is being chosen ("connector", "data reader", ..), for the error message.
        name: built-in name or dotted path.
        builtin: the names this package provides; a value may itself be a dotted path, imported when chosen.

    Raises:
        UserError: the name is unknown, or its module or attribute cannot be imported.
    """
    target = builtin.get(name, name)
    if not isinstance(target, str):
        return target
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        nearest = get_close_matches(name, builtin, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        names = ", ".join(sorted(builtin))
        raise UserError(f"unknown {kind} {name!r}: use one of {names}, or package.module.Class{hint}")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(f"{kind} {name!r}: cannot import {module_name} ({error}); is it on PYTHONPATH?") from error
    except AttributeError as error:
        raise UserError(f"{kind} {name!r}: module {module_name} has no {attribute!r}") from error
