"""The demo corpus: real images with true text from npm, PyPI and Debian packages, small enough to learn on two cores.

<data set>: captions, questions, interleaved, text; <split>: train, validation
<folder>/raw/<data set>/<split>/        as the readers take it
<folder>/tokenizer.model                4,096 pieces, trained on the training text
<folder>/prepared/<data set>/<split>/   as training reads it
<folder>/corpus.json                    what it was made from; written last
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mm1.data import demo_content, demo_pages
from megatron_mm1.data.demo_downloads import fetch_packages
from megatron_mm1.data.files import replace_file
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.readers import READERS
from megatron_mm1.data.tokenizer import open_tokenizer, train_tokenizer

log = logging.getLogger(__name__)

DEMO_CORPUS = Path(".cache/demo-corpus")
SPLITS = ("train", "validation")
DATA_SETS = ("captions", "interleaved", "questions", "text")
_VERSION = 3
_VOCAB_SIZE = 4096
_LICENCES = {
    "emoji-datasource-twitter": "pictures CC-BY 4.0 (Twemoji), names and categories MIT",
    "fonts-noto-color-emoji": "SIL Open Font License 1.1",
    "easy-vqa": "MIT",
    "gimp-help-en": "GNU Free Documentation License 1.2 or later",
    "wordnet-base": "WordNet 3.0 License",
}


def build_demo_corpus(folder: Path = DEMO_CORPUS, *, seed: int = 0) -> dict[str, Any]:
    """Build the corpus in `folder`, or keep the one that is there; the same packages and seed give the same bytes.

    Returns:
        What corpus.json holds: version, seed, packages, licences, tokenizer, and counts by data set and split.

    Raises:
        UserError: a tool is missing or a download fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder):
        corpus = _read_corpus(folder, seed)
        if corpus is None:
            for part in ("raw", "prepared", "tokenizer.model", "downloads"):
                _remove(folder / part)
            corpus = _build(folder, seed=seed)
            _remove(folder / "downloads")
            replace_file(folder / "corpus.json", (json.dumps(corpus, indent=1) + "\n").encode())
    return corpus


def _build(folder: Path, *, seed: int) -> dict[str, Any]:
    raw, prepared = folder / "raw", folder / "prepared"
    log.info("demo corpus: downloading packages")
    packages = fetch_packages(folder / "downloads")
    log.info("demo corpus: writing captions, questions and text")
    captions = demo_content.write_captions(
        raw / "captions", emoji=packages.emoji, noto_font=packages.noto_font, seed=seed
    )
    questions = demo_content.write_questions(raw / "questions", easy_vqa=packages.easy_vqa)
    glosses = demo_content.write_glosses(raw / "text", wordnet=packages.wordnet, seed=seed)
    pages = list(demo_pages.read_pages(packages.gimp_help))
    log.info("demo corpus: training the tokenizer")
    paragraphs = [value for _, blocks in pages for kind, value in blocks if kind == "text"]
    texts = captions["train"] + questions[::8] + paragraphs + glosses[::4]
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=_VOCAB_SIZE)
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    demo_pages.write_interleaved(
        raw / "interleaved",
        pages,
        folder=packages.gimp_help,
        num_tokens=lambda text: len(tokenizer.encode(text)),
        seed=seed,
    )
    log.info("demo corpus: preparing")
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for name in DATA_SETS:
        for split in SPLITS:
            documents = READERS[name](raw / name / split)
            manifest = prepare(
                documents, tokenizer=tokenizer, output=prepared / name / split, origin={"demo corpus": str(_VERSION)}
            )
            counts.setdefault(name, {})[split] = dict(manifest.counts)
    return {
        "version": _VERSION,
        "seed": seed,
        "packages": packages.versions,
        "licences": _LICENCES,
        "tokenizer": tokenizer.fingerprint,
        "counts": counts,
    }


def _read_corpus(folder: Path, seed: int) -> dict[str, Any] | None:
    """The finished corpus of this version and seed, or None."""
    try:
        corpus = json.loads((folder / "corpus.json").read_text())
    except (OSError, ValueError):
        return None
    complete = (folder / "tokenizer.model").is_file() and all(
        (folder / "prepared" / name / split / "manifest.json").is_file() for name in DATA_SETS for split in SPLITS
    )
    return corpus if complete and (corpus.get("version"), corpus.get("seed")) == (_VERSION, seed) else None


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Wait for another process that builds the same corpus."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
