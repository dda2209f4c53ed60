"""What images and texts are compared by."""

import re
import unicodedata
from functools import lru_cache

import imagehash
import numpy as np
import PIL.Image
import PIL.ImageOps
import xxhash

from megatron_mm1.data.image_headers import open_header

_MIN_CONTRAST = 2.0
_ENOUGH = 256
"""px; the hash is of 32 x 32."""
# Written without spaces, so that each character counts as a word: kana and Han.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0 modulo 2**64


def image_hash(data: bytes) -> int:
    """64 bits of an image's bytes."""
    return xxhash.xxh3_64_intdigest(data)


@lru_cache(maxsize=16)  # documents about one image follow one another
def perceptual_hash(data: bytes) -> int | None:
    """64 bits of what an image looks like (ImageHash's phash): similar images differ in few of them.

    Transparent parts count as white.

    Returns:
        None where the image cannot be decoded or there is nothing to see (the standard deviation of its grey levels, of
        255, is below 2): the hashes of all blank images are alike.
    """
    try:
        grey = _grey(data)
    except Exception:  # decoders raise what they like on damaged images
        return None
    if np.asarray(grey).std() < _MIN_CONTRAST:
        return None
    return int(str(imagehash.phash(grey)), 16)


def _grey(data: bytes) -> PIL.Image.Image:
    file = open_header(data)
    file.draft(None, (_ENOUGH, _ENOUGH))  # JPEG decodes at a half, a fourth or an eighth, no smaller than this
    picture = PIL.ImageOps.exif_transpose(file).convert("RGBA")
    opaque = PIL.Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture)
    return opaque.convert("L")


def words_of(text: str) -> list[str]:
    """The words of a text without what often differs between copies of it: case, punctuation, white space, and forms
    of one character (Unicode NFKC).
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(unicodedata.normalize("NFKC", folded))


def text_hash(words: list[str]) -> int:
    """64 bits of a whole text."""
    return xxhash.xxh3_64_intdigest(" ".join(words).encode())


def run_hashes(words: list[str], length: int) -> np.ndarray:
    """uint64, 64 bits of every run of `length` words, each once; empty where the text is shorter."""
    if len(words) < length:
        return np.zeros(0, np.uint64)
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64)
    runs = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):  # a polynomial in _BASE modulo 2**64
        runs = runs * _BASE + hashes[place : place + len(runs)]
    return np.unique(runs)
