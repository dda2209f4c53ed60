"""The dotted keys of a configuration, read off the schema: their types, defaults and documentation."""

import ast
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

from megatron_mm1.config.schema import MM1Config

_UNTRIED = {
    "tensor-parallel communication overlapped with products": ("tp_comm_overlap", "ub_tp_comm_overlap"),
    "DeepEP": ("flex", "deepep", "moe_enable_deepep", "moe_flex_dispatcher_backend"),
    "CUDA graphs": ("cuda_graph_impl", "cuda_graph_modules", "cuda_graph_scope", "enable_cuda_graph", "use_cuda_graph"),
}
"""What megatron-core has for GPUs and is left out here until it has been run on one, by the words that ask for it."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting (`parallel.sequence_parallel`), or a group of them that may be null (`model.moe`)."""

    path: str
    annotation: Any
    doc: str

    @property
    def type_name(self) -> str:
        """The type as an error message or the help shows it: `int`, `int or null`, `bf16|fp32`."""
        return describe_type(self.annotation)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def is_required(cls: type, name: str) -> bool:
    field = next(field for field in fields(cls) if field.name == name)
    return field.default is MISSING and field.default_factory is MISSING


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it; empty for a field without one, or where there is no source to read."""
    try:
        definition = ast.parse(inspect.getsource(cls)).body[0]
    except OSError:
        return {}
    docs = {}
    for statement, following in pairwise(cast(ast.ClassDef, definition).body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _is_union(annotation: Any) -> bool:
    """Also of a Literal, whose `|` makes typing's kind of union."""
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def group_class(annotation: Any) -> type | None:
    """The dataclass behind an annotation `X` or `X | None`; None for a plain value."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def is_nullable(annotation: Any) -> bool:
    return _is_union(annotation) and types.NoneType in typing.get_args(annotation)


def element_class(annotation: Any) -> type | None:
    """The dataclass X of `tuple[X, ...]`; None for anything else."""
    return group_class(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is tuple else None


def describe_type(annotation: Any) -> str:
    """A type in words."""
    arguments = typing.get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if _is_union(annotation):
        return " or ".join(describe_type(argument) for argument in arguments)
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(arguments)
    if element := element_class(annotation):
        return f"a list of {{{', '.join(field_types(element))}}}"
    if typing.get_origin(annotation) is tuple and arguments[-1] is ...:
        return f"a list of {describe_type(arguments[0])}"
    if typing.get_origin(annotation) is tuple:
        return f"a list of {len(arguments)} {arguments[0].__name__}s"
    if group := group_class(annotation):
        return f"{{{', '.join(field_types(group))}}}"
    if typing.get_origin(annotation) is dict:
        _, of = typing.get_args(annotation)
        return "a mapping" if of is Any else f"a mapping to {describe_type(of)}"
    return annotation.__name__


@cache
def all_keys() -> dict[str, Key]:
    """Every key that can be set, by dotted path, in the schema's order."""
    return {key.path: key for key in _walk(MM1Config, "")}


def _walk(cls: type, prefix: str) -> Iterator[Key]:
    docs = field_docs(cls)
    for name, annotation in field_types(cls).items():
        group = group_class(annotation)
        if group is None or is_nullable(annotation):
            doc = docs.get(name) or (group and inspect.getdoc(group)) or ""
            yield Key(path=prefix + name, annotation=annotation, doc=doc)
        if group is not None:
            yield from _walk(group, f"{prefix}{name}.")


def value_at(config: Any, path: str) -> Any:
    """The value of `path` in a configuration; None below a group that is null."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def refusal(word: str) -> str:
    """Why the setting or value `word` of megatron-core is not offered; empty where there is nothing to say."""
    for what, words in _UNTRIED.items():
        if word in words:
            return f": {what}, not run on a GPU with this model yet, and not offered until then: leave it out"
    return ""
