"""The part of bash that launch scripts are written in: assignments, variables, conditions, one command.

No command is run. What is outside of it (loops, functions, `case`, the output of commands) is reported by line.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_mm1.errors import UserError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for a part of a word that only running the script would tell."""

_ASSIGNMENT = re.compile(r"(?:export\s+|readonly\s+|local\s+)?([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(\[[@*]\])?(?:(:?[-=+])(.*?))?\})", re.DOTALL)
_NO_WORD = "\0"
"""What an empty array in quotes is expanded to: no word, where an empty variable is an empty one."""
_CONDITION = re.compile(r"\[\[?\s+(.*?)\s+\]\]?$", re.DOTALL)
_BEFORE_COMMENT = " \t\n;("


@dataclass(frozen=True)
class Script:
    """What a script would run.

    Attributes:
        arguments: of the training program, variables expanded.
        unset: variables that were read and never set, in order.
        unread: what was passed over, each with its line.
    """

    arguments: tuple[str, ...]
    unset: tuple[str, ...]
    unread: tuple[str, ...]


def read_script(text: str, *, program: str, variables: Mapping[str, str]) -> Script:
    """The arguments that `text` starts the last command with whose words include one that ends in `program`.

    Args:
        variables: of the environment; the script's own assignments outrank them, as in bash.

    Raises:
        UserError: there is no such command, or a quote is not closed.
    """
    shell = _Shell(program=program, variables={name: [value] for name, value in variables.items()})
    for line, statement in _statements(text):
        shell.execute(statement, line)
    if shell.arguments is None:
        raise UserError(f"the script runs no {program}: name the training program with --program")
    return Script(tuple(shell.arguments), tuple(dict.fromkeys(shell.unset)), tuple(shell.unread))


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, statement), split at newlines and `;` outside of quotes and parentheses; comments and continuations go."""
    start, line, depth, quote, current = 1, 1, 0, "", ""
    position = 0
    while position < len(text):
        character = text[position]
        line += character == "\n"
        if character == "\\" and quote != "'":
            following = text[position + 1 : position + 2]
            line += following == "\n"
            current += "" if following == "\n" else character + following
            position += 2
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif character == "#" and (not current or current[-1] in _BEFORE_COMMENT):
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
            continue
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character in "\n;" and depth <= 0:
            if current.strip():
                yield start, current.strip()
            current, depth, start = "", 0, line
            position += 1
            continue
        if not current.strip():
            start = line
        current += character
        position += 1
    if quote:
        raise UserError(f"the script's quote {quote} in line {start} is not closed")
    if current.strip():
        yield start, current.strip()


@dataclass
class _Shell:
    program: str
    variables: dict[str, list[str]]
    """A plain one is an array of one, as in bash."""
    arguments: list[str] | None = None
    unset: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    branches: list[tuple[bool, bool]] = field(default_factory=list)
    """Of each `if` around: whether a branch of it was taken, and whether this one is."""
    skipped: int = 0
    """Loops, cases and functions around."""

    def execute(self, statement: str, line: int) -> None:
        word, _, rest = statement.partition(" ")
        word, rest = word.strip(), rest.strip()
        if word in ("done", "esac", "}"):
            self.skipped = max(0, self.skipped - 1)
        elif word in ("for", "while", "until", "case") or statement.endswith("{"):
            self.skipped += 1
            self.unread.append(f"line {line}: {statement.splitlines()[0]}: its body is not read")
        elif self.skipped:
            return
        elif word == "if":
            self._branch(rest, line, first=True)
        elif word == "elif":
            self._branch(rest, line, first=False)
        elif word == "fi":
            if self.branches:
                self.branches.pop()
        elif word in ("then", "else"):
            if word == "else" and self.branches:
                taken, _ = self.branches[-1]
                self.branches[-1] = (True, not taken)
            if rest:
                self.execute(rest, line)
        elif all(active for _, active in self.branches):
            self._run(statement)

    def _branch(self, condition: str, line: int, *, first: bool) -> None:
        taken = False if first or not self.branches else self.branches.pop()[0]
        around = all(active for _, active in self.branches)
        value = self._holds(condition) if around and not taken else False
        if value is None:
            self.unread.append(f"line {line}: if {condition}: taken for false")
        self.branches.append((taken or bool(value), bool(value)))

    def _holds(self, condition: str) -> bool | None:
        """Whether a test such as [[ $A -eq 1 ]] is true; None: it is none that can be told."""
        match = _CONDITION.match(condition)
        words = self._words(match[1]) if match else []
        if any(UNKNOWN in word for word in words):
            return None
        match words:
            case ["-z", *value]:
                return not "".join(value)
            case ["-n", *value]:
                return bool("".join(value))
            case [left, "==" | "=" | "-eq", right]:
                return left == right
            case [left, "!=" | "-ne", right]:
                return left != right
            case ["==" | "=" | "-eq", _]:  # an empty variable on the left
                return False
            case ["!=" | "-ne", _]:
                return True
        return None

    def _run(self, statement: str) -> None:
        assigned = _ASSIGNMENT.fullmatch(statement)
        if assigned and self._is_one_value(assigned[3]):
            name, append, value = assigned.groups()
            before = self.variables.get(name, []) if append else []
            if value.startswith("("):
                self.variables[name] = before + self._words(value.strip().removeprefix("(").removesuffix(")"))
            else:
                self.variables[name] = ["".join(before[:1]) + " ".join(self._words(value)), *before[1:]]
            return
        if self.program in statement or "$" in statement:
            self._command(self._words(statement))

    @staticmethod
    def _is_one_value(value: str) -> bool:
        """Not `A=1 command`, where the assignment holds for a command."""
        if value.startswith("("):
            return True
        return len(_split(_COMMAND_OUTPUT.sub("x", value))) <= 1

    def _command(self, words: list[str]) -> None:
        """Keeps the arguments where `words` start the program, themselves or in a word of theirs (sh -c "..")."""
        for word in words:
            if f"{self.program} " in word:
                words = _split(word)
        for position, word in enumerate(words):
            if word.endswith(self.program):
                self.arguments = _before_redirection(words[position + 1 :])

    def _words(self, text: str) -> list[str]:
        """The words of `text` as bash would see them."""
        return [word for word in _split(self._expand(text)) if word != _NO_WORD]

    def _expand(self, text: str) -> str:
        """Variables replaced outside of single quotes, so that `_split` gives bash's words."""
        pieces, inside = [], ""
        for piece in re.split(r"('|\"|\\.)", _COMMAND_OUTPUT.sub(_output, text), flags=re.DOTALL):
            if piece in ("'", '"') and inside in ("", piece):
                inside = "" if inside else piece
            elif inside != "'" and not piece.startswith("\\"):
                quoted = inside == '"'
                piece = _VARIABLE.sub(lambda match, quoted=quoted: self._value(match, quoted=quoted), piece)
            pieces.append(piece)
        return "".join(pieces)

    def _value(self, match: re.Match[str], *, quoted: bool) -> str:
        """What a variable stands for, as text that `_split` makes bash's words of."""
        name, every, operator, operand = match[1] or match[2], match[3], match[4] or "", match[5] or ""
        values = self.variables.get(name)
        missing = values is None or (operator.startswith(":") and not "".join(values))
        if operator.endswith("+"):
            values = [] if missing else self._words(operand)
        elif operator and missing:
            values = self._words(operand)
            if operator.endswith("="):
                self.variables[name] = values
        elif values is None:
            self.unset.append(name)
        values = values or []
        if every == "[@]" and quoted:
            return '" "'.join(_escaped(value, quoted=True) for value in values) or _NO_WORD
        return _escaped(" ".join(values if every or operator else values[:1]), quoted=quoted)


_COMMAND_OUTPUT = re.compile(r"`[^`]*`|\$\((?:[^()]|\([^()]*\))*\)")


def _output(match: re.Match[str]) -> str:
    """What a command would print: the folder for `pwd`, otherwise unknown."""
    return "." if match[0].strip("`$() ") == "pwd" else UNKNOWN


def _escaped(value: str, *, quoted: bool) -> str:
    """A variable's value so that `_split` leaves its quotes alone, as bash does."""
    return re.sub(r'(["\\])' if quoted else r"([\"'\\])", r"\\\1", value)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot read {text[:60]!r} of the script: {error}") from None


def _before_redirection(words: list[str]) -> list[str]:
    ends = [position for position, word in enumerate(words) if re.match(r"\||&|\d?>", word)]
    return words[: ends[0]] if ends else words
