"""Turns the unpacked packages into data sets as the readers expect them: captions, questions and plain text."""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import PIL.Image
from fontTools.ttLib import TTFont

from megatron_mm1.errors import UserError

STYLES = ("twemoji", "noto")
EMOJI_SIDE = 64
_UNSEEN_CONCEPTS, _HELD_STYLE_CONCEPTS = 130, 500
_SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


def keyed(seed: int, key: str) -> int:
    """A number that depends on seed and key alone, for splitting."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big")


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Captions


class NotoGlyphs:
    """The bitmaps of Noto Color Emoji, found without a text shaper so that every machine gets the same."""

    def __init__(self, path: Path) -> None:
        font = TTFont(path, lazy=True)
        if "CBDT" not in font:
            raise UserError(f"{path} has no bitmaps (CBDT): the demo corpus needs Debian's fonts-noto-color-emoji")
        self._characters = font.getBestCmap()
        self._bitmaps = font["CBDT"].strikeData[0]
        self._ligatures: dict[tuple[str, ...], str] = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            for table in lookup.SubTable:
                if table.LookupType == 4:
                    for first, ligatures in table.ligatures.items():
                        for ligature in ligatures:
                            self._ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)

    def png(self, sequence: str) -> bytes | None:
        """The PNG of a sequence of code points like "1F468-200D-1F33E"; None where the font has none."""
        glyphs = tuple(self._characters.get(int(code, 16)) for code in sequence.split("-") if code != "FE0F")
        glyph = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
        return self._bitmaps[glyph].imageData if glyph in self._bitmaps else None


def on_white(data: bytes) -> PIL.Image.Image:
    """The image with its transparency over white, RGB."""
    image = PIL.Image.open(io.BytesIO(data)).convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")


def png_bytes(image: PIL.Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _square_emoji(data: bytes) -> bytes:
    image = on_white(data)
    side = max(image.size)
    square = PIL.Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return png_bytes(
        square if side == EMOJI_SIDE else square.resize((EMOJI_SIDE, EMOJI_SIDE), PIL.Image.Resampling.BICUBIC)
    )


def caption_of(emoji: dict[str, Any], tones: str | None) -> str:
    """`<kind>: <name>[, <skin tone>]`, say "animal mammal: dog face": the kind, which a glance tells, comes first."""
    kind = emoji["subcategory"].replace("-", " ").lower()
    name = emoji["name"].lower()
    if emoji["category"] == "Flags":
        name = name.removesuffix(" flag")
    tone = "" if tones is None else ", " + " and ".join(_SKIN_TONES[code] for code in tones.split("-"))
    return f"{kind}: {name}{tone}"


def write_captions(output: Path, *, emoji: Path, noto_font: Path, seed: int) -> dict[str, list[str]]:
    """`train` and `validation` folders for the captions reader; returns the captions of each.

    Each emoji is a concept, drawn in two styles. A validation row's "kind" says what is new about it: "heldstyle" (the
    concept was trained in the other style only) or "unseen" (the concept was not trained at all).
    """
    glyphs = NotoGlyphs(noto_font)
    concepts = [entry for entry in json.loads((emoji / "emoji.json").read_text()) if entry["category"] != "Component"]
    concepts.sort(key=lambda entry: keyed(seed, entry["unified"]))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    sources: dict[Path, bytes] = {}
    for rank, concept in enumerate(concepts):
        held_style = STYLES[rank % 2] if _UNSEEN_CONCEPTS <= rank < _UNSEEN_CONCEPTS + _HELD_STYLE_CONCEPTS else None
        for tones, drawing in ((None, concept), *concept.get("skin_variations", {}).items()):
            noto = glyphs.png(drawing["unified"])
            if noto is None:  # newer than the font: a concept must have both styles
                continue
            twemoji = (emoji / "img/twitter/64" / drawing["image"]).read_bytes()
            for style, picture in zip(STYLES, (twemoji, noto), strict=True):
                kind = "unseen" if rank < _UNSEEN_CONCEPTS else "heldstyle" if style == held_style else "train"
                split = "train" if kind == "train" else "validation"
                name = f"images/{style}-{drawing['unified'].lower()}.png"
                sources[output / split / name] = picture
                caption = caption_of(concept, tones)
                row = {"image": name, "caption": caption, "style": style, "concept": concept["unified"]}
                rows[split].append(row | ({} if kind == "train" else {"kind": kind}))
    write_images(sources, _square_emoji)
    for split, split_rows in rows.items():
        write_rows(output / split / "captions.jsonl", split_rows)
    return {split: [row["caption"] for row in split_rows] for split, split_rows in rows.items()}


def write_images(sources: dict[Path, bytes], convert: Callable[[bytes], bytes]) -> None:
    for folder in {file.parent for file in sources}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # Pillow works outside the interpreter lock
        for file, data in zip(sources, pool.imap(convert, sources.values(), chunksize=64), strict=True):
            file.write_bytes(data)


# Questions


def write_questions(output: Path, *, easy_vqa: Path) -> list[str]:
    """`train` and `validation` folders for the questions reader; returns the training questions and answers."""
    texts = []
    for split, name in (("train", "train"), ("validation", "test")):
        questions = json.loads((easy_vqa / name / "questions.json").read_text())
        shutil.copytree(easy_vqa / name / "images", output / split / "images", dirs_exist_ok=True)
        rows = [{"image": f"images/{image}.png", "question": q, "answer": a} for q, a, image in questions]
        write_rows(output / split / "questions.jsonl", rows)
        if split == "train":
            texts = [f"Question: {question} Short answer: {answer}" for question, answer, _ in questions]
    return texts


# Plain text


def write_glosses(output: Path, *, wordnet: Path, seed: int) -> list[str]:
    """`train` and `validation` files, one "word: definition" per line; returns the training lines."""
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for part in ("noun", "verb", "adj", "adv"):
        for entry in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines():
            fields, bar, gloss = entry.partition(" | ")
            if bar and not entry.startswith(" "):  # the licence at the top is indented
                word = re.sub(r"\(\w+\)$", "", fields.split(" ")[4]).replace("_", " ")
                line = f"{word}: {gloss.strip()}"
                lines["train" if keyed(seed, line) % 100 else "validation"].append(line)
    for split, split_lines in lines.items():
        file = output / split / "glosses.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(line + "\n" for line in split_lines), encoding="utf-8")
    return lines["train"]
