"""docs/troubleshooting.md quotes messages that exist, and leaves none out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "megatron_mm1"


def quoted() -> list[str]:
    """The messages of the tables' first column, `..` where they vary."""
    rows = (line for line in (REPOSITORY / "docs" / "troubleshooting.md").read_text().splitlines() if line[:3] == "| `")
    return [match.group(1) for match in (re.match(r"\| `([^`]+)`", row) for row in rows) if match]


def texts(file: Path) -> Iterator[str]:
    """Every string of a file, `{}` where it varies."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def errors(file: Path) -> Iterator[str]:
    """What `UserError` and `ConfigError` are made with, and what the rules of the configuration yield."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Call(func=ast.Name("UserError" | "ConfigError"), args=[argument, *_]):
                made = argument
            case ast.Yield(value=ast.JoinedStr() as value) if file.parent.name == "config":
                made = value
            case _:
                continue
        yield from (text for text in texts_of(made) if len(text.replace("{}", "").strip()) > 12)


def texts_of(node: ast.AST) -> Iterator[str]:
    """The message itself: not the strings inside what varies in it."""
    match node:
        case ast.JoinedStr(values=values):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in values)
        case ast.Constant(value=str(text)):
            yield text
        case ast.List(elts=elements):
            for element in elements:
                yield from texts_of(element)


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*?".join(re.escape(part.strip()) for part in message.split("..") if part.strip()), re.DOTALL)


def test_there_is_something_to_check():
    assert len(quoted()) > 100


def test_every_quoted_message_is_in_the_source():
    source = [text for file in PACKAGE.rglob("*.py") for text in texts(file)]
    assert [message for message in quoted() if not any(map(pattern(message).search, source))] == []


def test_every_message_is_explained():
    patterns = [pattern(message) for message in quoted()]
    found = {message for file in PACKAGE.rglob("*.py") for message in errors(file)}
    assert len(found) > 200
    assert sorted(text for text in found if not any(each.search(text) for each in patterns)) == []
