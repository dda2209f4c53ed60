"""Fetches the packages the demo corpus is made from: downloaded and unpacked below a folder, nothing installed."""

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm1.errors import UserError

log = logging.getLogger(__name__)

_NPM_PACKAGE, _NPM_VERSION = "emoji-datasource-twitter", "16.0.0"
_NPM_SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
_PYPI_PACKAGE, _PYPI_VERSION = "easy-vqa", "1.0"
_PYPI_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
_DEBIAN_PACKAGES = ("fonts-noto-color-emoji", "gimp-help-en", "wordnet-base")
_ATTEMPTS = 3


@dataclass(frozen=True)
class Packages:
    """Where the unpacked packages are, and which they were.

    Attributes:
        emoji: folder with emoji.json and img/twitter/64/*.png.
        noto_font: NotoColorEmoji.ttf.
        easy_vqa: folder with train/ and test/.
        gimp_help: folder with *.html and images/.
        wordnet: folder with data.noun, data.verb, ..
        versions: version of each package by its name.
    """

    emoji: Path
    noto_font: Path
    easy_vqa: Path
    gimp_help: Path
    wordnet: Path
    versions: dict[str, str]


def fetch_packages(folder: Path) -> Packages:
    """Download and unpack all packages into `folder`.

    Raises:
        UserError: a tool is missing, a download fails, or a file is not the one expected.
    """
    _require("npm", "install Node.js (apt-get install npm)")
    for tool in ("apt-get", "dpkg"):
        _require(tool, "build the demo corpus on Debian or Ubuntu, or copy the folder from there")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {_NPM_PACKAGE: _NPM_VERSION, _PYPI_PACKAGE: _PYPI_VERSION}
    emoji, easy_vqa = _fetch_emoji(folder / "npm"), _fetch_easy_vqa(folder / "pypi")
    root = folder / "root"
    for file in _fetch_debian(folder / "debian"):
        name, version, _ = file.stem.split("_")
        versions[name] = version.replace("%3a", ":")
        _run(["dpkg", "-x", file.name, str(root.resolve())], cwd=file.parent)
    return Packages(
        emoji=emoji,
        noto_font=root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
        easy_vqa=easy_vqa,
        gimp_help=root / "usr/share/gimp/2.0/help/en",
        wordnet=root / "usr/share/wordnet",
        versions=versions,
    )


def _fetch_emoji(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    _run(["npm", "pack", f"{_NPM_PACKAGE}@{_NPM_VERSION}", "--loglevel=error"], cwd=folder)
    archive = folder / f"{_NPM_PACKAGE}-{_NPM_VERSION}.tgz"
    _verify(archive, _NPM_SHA256)
    with tarfile.open(archive) as tar:
        wanted = ("package/img/twitter/64/", "package/emoji.json")
        tar.extractall(folder, [member for member in tar if member.name.startswith(wanted)], filter="data")
    return folder / "package"


def _fetch_easy_vqa(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    package = f"{_PYPI_PACKAGE}=={_PYPI_VERSION}"
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", package], cwd=folder)
    archive = folder / f"{_PYPI_PACKAGE.replace('-', '_')}-{_PYPI_VERSION}-py3-none-any.whl"
    _verify(archive, _PYPI_SHA256)
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder)
    return folder / "easy_vqa" / "data"


def _fetch_debian(folder: Path) -> list[Path]:
    """The .deb files; where this machine has no package lists, they are fetched into a folder of ours."""
    folder.mkdir(exist_ok=True)
    try:
        _run(["apt-get", "download", *_DEBIAN_PACKAGES], cwd=folder, attempts=1)
    except UserError as without_lists:
        log.info("fetching Debian's package lists (%s)", without_lists)
        options = []
        for name, kept in (("State", "lists"), ("Cache", "archives")):
            (folder / name / kept / "partial").mkdir(parents=True, exist_ok=True)
            options += ["-o", f"Dir::{name}={(folder / name).resolve()}"]
        options += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        _run(["apt-get", *options, "update", "--quiet"], cwd=folder)
        _run(["apt-get", *options, "download", *_DEBIAN_PACKAGES], cwd=folder)
    files = []
    for package in _DEBIAN_PACKAGES:
        found = sorted(folder.glob(f"{package}_*.deb"))
        if len(found) != 1:
            raise UserError(
                f"expected one {package}_*.deb in {folder}, found {len(found)}: remove {folder} and try again"
            )
        files += found
    return files


def _require(tool: str, remedy: str) -> None:
    if shutil.which(tool) is None:
        raise UserError(f"building the demo corpus needs {tool!r}, which is not on PATH: {remedy}")


def _verify(file: Path, sha256: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "nothing"
    if found != sha256:
        raise UserError(f"{file.name}: expected SHA-256 {sha256}, got {found}: check the package index it came from")


def _run(command: Sequence[str], *, cwd: Path, attempts: int = _ATTEMPTS) -> None:
    for attempt in range(1, attempts + 1):
        result = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        if attempt < attempts:
            time.sleep(2**attempt)
    lines = (result.stderr or result.stdout).strip().splitlines()
    problems = [line for line in lines if line.lstrip().startswith(("E:", "ERROR", "npm error"))] or lines[-3:]
    raise UserError(f"`{' '.join(command)}` failed {attempts} times: {' '.join(problems) or result.returncode}")
