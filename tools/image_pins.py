"""Print the lines of requirements.lock that an image lacks, for `pip install --no-deps -r`.

An image with a torch of its own keeps everything that this torch was built and tested with. Replaced is only what is
too old or too new for pyproject.toml; where that is torch itself, the image is refused.

usage: python tools/image_pins.py [--extras]   (--extras: also what only the extras, such as dev, need)
"""

import argparse
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS_HEADER = "# For the extras alone:"


class ImageError(Exception):
    """The image cannot become one for this package."""


def locked(lock: Sequence[str], *, extras: bool) -> Iterator[tuple[str, str]]:
    """(name, version) of the lines of a lock."""
    for line in lock:
        if line == EXTRAS_HEADER and not extras:
            return
        if not line.startswith("#"):
            name, version = line.split("==")
            yield name, version


def missing_pins(
    lock: Sequence[str], requirements: Sequence[str], installed: Mapping[str, str], *, extras: bool = False
) -> list[str]:
    """The pins to install.

    Args:
        lock: lines of requirements.lock.
        requirements: what pyproject.toml asks for, such as "numpy>=2.0".
        installed: version by canonical name.

    Raises:
        ImageError: torch is not there, or does not meet its requirement.
    """
    wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, requirements)}
    torch = installed.get("torch")
    if torch is None or not _meets(torch, wanted["torch"]):
        raise ImageError(f"the base image has torch {torch}, and torch{wanted['torch']} is needed: choose another BASE")
    return [
        f"{name}=={version}"
        for name, version in locked(lock, extras=extras)
        if name not in installed or not _meets(installed[name], wanted.get(name, SpecifierSet()))
    ]


def _meets(version: str, specifier: SpecifierSet) -> bool:
    # An image calls its own build of a release "2.11.0a0+3f2c1d.nv26.03", which is not older than 2.11 here.
    return specifier.contains(Version(version).base_version)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--extras", action="store_true", help="also what only the extras need")
    extras = parser.parse_args().extras
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    if extras:
        requirements += project["project"]["optional-dependencies"]["dev"]
    installed = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    try:
        print("\n".join(missing_pins(lock, requirements, installed, extras=extras)))
    except ImageError as error:
        print(f"image_pins: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
