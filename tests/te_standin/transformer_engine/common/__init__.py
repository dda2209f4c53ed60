"""`recipe` is the release's own module."""

from transformer_engine._release import ROOT

__path__.append(str(ROOT / "common"))

from transformer_engine.common import recipe  # noqa: E402

__all__ = ["recipe"]
