"""The text of a sequence that is being generated, as far as it is certain."""

from collections.abc import Callable, Sequence

_WINDOW = 32
"""Tokens that are decoded again for each new one: how a token reads depends on those before it."""
_INCOMPLETE = "\ufffd"


class OutputText:
    """Text of tokens that come one by one, up to the first stop string.

    Args:
        decode: the text of token ids.

    Attributes:
        text: so far; without the stop string once there is one. A character whose bytes are not all there yet is not
            part of it.
        stopped: whether a stop string came.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._ids: list[int] = []
        self._window, self._before = 0, ""  # the window's first token, and the text of all before it
        self._given = 0
        self.text, self.stopped = "", False

    def add(self, token: int) -> None:
        """Another token; not after `stopped`."""
        self._ids.append(token)
        seen = self._decode(self._ids[self._window :])
        if seen.endswith(_INCOMPLETE):
            return
        known = len(self.text)
        self.text = self._before + seen
        self._look_for_stop(max(0, known - self._longest + 1))
        if len(self._ids) - self._window >= 2 * _WINDOW:
            kept = self._decode(self._ids[-_WINDOW:])
            if seen.endswith(kept):
                self._window = len(self._ids) - _WINDOW
                self._before = self.text[: len(self.text) - len(kept)]

    def end(self) -> None:
        """No more tokens come: what was no character yet stays none."""
        if not self.stopped:
            known = len(self.text)
            self.text = self._decode(self._ids)
            self._look_for_stop(max(0, known - self._longest + 1))

    def new_text(self, *, is_final: bool = False) -> str:
        """What was not returned before and no stop string can take back any more."""
        certain = len(self.text)
        if not (is_final or self.stopped):
            certain -= self._beginning_of_stop()
        text = self.text[self._given : certain]
        self._given = max(self._given, certain)
        return text

    def _look_for_stop(self, start: int) -> None:
        places = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _beginning_of_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )
