"""The pinned release's Python source: signatures to check calls with, and functions that need no CUDA."""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping, Set
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(str(metadata.distribution("transformer_engine").locate_file("transformer_engine")))
"""The package inside the unpacked wheel."""


@functools.cache
def _definitions(path: str) -> Mapping[str, ast.FunctionDef]:
    """The functions of a file, and the methods as `Class.method`."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def signature(path: str, name: str) -> inspect.Signature:
    """The signature of a function, or of `Class.method`, in a file of the release."""
    definition = _definitions(path)[name].args
    names = [(argument, inspect.Parameter.POSITIONAL_ONLY) for argument in definition.posonlyargs]
    names += [(argument, inspect.Parameter.POSITIONAL_OR_KEYWORD) for argument in definition.args]
    defaults = [None] * (len(names) - len(definition.defaults)) + list(definition.defaults)
    if definition.vararg:
        names.append((definition.vararg, inspect.Parameter.VAR_POSITIONAL))
        defaults.append(None)
    names += [(argument, inspect.Parameter.KEYWORD_ONLY) for argument in definition.kwonlyargs]
    defaults += definition.kw_defaults
    if definition.kwarg:
        names.append((definition.kwarg, inspect.Parameter.VAR_KEYWORD))
        defaults.append(None)
    return inspect.Signature(
        [
            inspect.Parameter(argument.arg, kind, default=_value(default))
            for (argument, kind), default in zip(names, defaults, strict=True)
        ]
    )


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return inspect.Parameter.empty
    return eval(compile(ast.Expression(default), "<default>", "eval"), {"torch": torch})


def functions(path: str, *names: str, **namespace: Any) -> list[Callable[..., Any]]:
    """Functions of the release, compiled out of a file that cannot be imported here.

    Args:
        path: file within the package.
        names: of the functions; they can call each other.
        namespace: what else they refer to.
    """
    body: list[ast.stmt] = [
        ast.ImportFrom("__future__", [ast.alias("annotations")], 0),
        *(_definitions(path)[name] for name in names),
    ]
    code = compile(ast.fix_missing_locations(ast.Module(body, [])), str(ROOT / path), "exec")
    exec(code, namespace)
    return [namespace[name] for name in names]


def bind(path: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], used: Set[str]) -> SimpleNamespace:
    """The arguments of a call by name, defaults included.

    Raises:
        TypeError: the release takes no such call; it names the function or class, and the argument.
        NotImplementedError: an argument outside `used` has another value than its default.
    """
    expected = signature(path, name)
    try:
        bound = expected.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"transformer_engine {path}: {name}: {error}") from None
    for argument, value in bound.arguments.items():
        default = expected.parameters[argument].default
        if argument not in used and argument != "self" and value is not default and value != default:
            raise NotImplementedError(f"{name}: the stand-in does not act on {argument}={value!r}")
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def released(path: str, *used: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function of one namespace of arguments so that it is called as the release's function of its name.

    A method's name includes its class's; its own `self` comes first.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__qualname__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = bind(path, name, args, kwargs, set(used))
            return function(arguments.self, arguments) if "." in name else function(arguments)

        call.__signature__ = signature(path, name)  # type: ignore[attr-defined]  # megatron-core looks
        return call

    return decorate
