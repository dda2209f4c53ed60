"""Write requirements.lock: the exact versions that `make venv` installs.

pip resolves the requirements of pyproject.toml (with the extras below) and the pins below without installing anything.
CUDA libraries that only torch asks for are left out, so that the lock also fits a CPU build of torch.
To keep what is locked and add only what is new: `PIP_CONSTRAINT=requirements.lock make lock`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from image_pins import EXTRAS_HEADER
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("eval", "dev")
PINS = ("torch==2.11.0", "torchvision==0.26.0")
TORCH_CUDA = re.compile(r"nvidia-|cuda-|triton")

HEADER = """\
# Exact versions for Python {python} on Linux x86-64: the package with its extras {extras}.
# Made by `make lock` (tools/lock.py); do not edit. Installed by tools/bootstrap.sh (`make venv`).
# No hashes, and none of the CUDA libraries that only torch asks for (torch itself names their exact versions), so that
# the same file serves a CPU build of torch. The nvidia-* entries below are what DALI needs, on CPU too.
"""


def resolve(requirements: list[str]) -> list[dict]:
    """What pip would install into an empty environment, as the entries of its JSON report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), *requirements], check=True)
        return json.loads(report.read_text())["install"]


def needed(report: list[dict], roots: list[str]) -> set[str]:
    """Names reachable from the roots without the step from torch to its CUDA libraries."""
    metadata = {canonicalize_name(entry["metadata"]["name"]): entry["metadata"] for entry in report}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            for text in metadata[name].get("requires_dist", ()):
                child = Requirement(text)
                applies = child.marker is None or child.marker.evaluate({"extra": extra})
                if applies and not (name == "torch" and TORCH_CUDA.match(child.name)):
                    queue.append(child)
    return {name for name, _ in seen}


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra]), *PINS]
    report = resolve(roots)
    names = needed(report, roots)
    package = needed(report, [*project["dependencies"], "torch"])
    versions = {canonicalize_name(e["metadata"]["name"]): e["metadata"]["version"] for e in report}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = {name: f"{name}=={versions[name].split('+')[0]}\n" for name in sorted(names)}
    lines = [*(pins[name] for name in pins if name in package), EXTRAS_HEADER + "\n"]
    lines += [pins[name] for name in pins if name not in package]
    unfinished = ROOT / "requirements.lock.tmp"
    unfinished.write_text(HEADER.format(python=python, extras=", ".join(EXTRAS)) + "".join(lines))
    os.replace(unfinished, ROOT / "requirements.lock")
    print(f"requirements.lock: {len(pins)} packages, {len(report) - len(pins)} left to torch's own CUDA requirements")


if __name__ == "__main__":
    main()
