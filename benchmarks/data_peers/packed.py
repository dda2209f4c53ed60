"""What both peers share: an image and a caption -> an example, examples -> one packed sequence."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import PIL.Image
import sentencepiece
import torch
from torch import Tensor
from torchvision import transforms

SEQ_LENGTH, MAX_IMAGES, TOKENS_PER_IMAGE = 4096, 16, 144
IMAGE_SIZE = 378
IGNORE = -100
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PREPROCESS = transforms.Compose(
    [
        transforms.Resize((IMAGE_SIZE, IMAGE_SIZE), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(_MEAN, _STD),
    ]
)


@cache
def processor(model: str) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model of a file, opened once in each process."""
    return sentencepiece.SentencePieceProcessor(model_file=model)


def text_ids(caption: str, *, model: str) -> list[int]:
    """Tokens of a caption and EOS."""
    opened = processor(model)
    return [*opened.encode(caption), opened.eos_id()]


def pixels(data: bytes) -> Tensor:
    """[3, 378, 378] float32: decoded by Pillow, resized to a square and normalised."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return _PREPROCESS(image.convert("RGB"))


@dataclass(frozen=True)
class Example:
    """An image and its caption: BOS, the image's positions, the text.

    Attributes:
        ids: tokens of the text and EOS.
        image: [3, 378, 378] pixels, or the encoded file where it is decoded later.
    """

    ids: list[int]
    image: Tensor | bytes

    @property
    def length(self) -> int:
        return 1 + TOKENS_PER_IMAGE + len(self.ids)


@dataclass(frozen=True)
class PackedSequence:
    """A packed sequence of 4096 positions.

    Attributes:
        tokens, labels, position_ids: [4096] int64.
        segment_ids: [4096] int32, 0 for padding.
        images: [N, 3, 378, 378] float32.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    images: Tensor


def greedy(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples in order, as many to a sequence as it holds."""
    waiting: list[Example] = []
    filled = 0
    for example in examples:
        if waiting and (filled + example.length > SEQ_LENGTH or len(waiting) == MAX_IMAGES):
            yield waiting
            waiting, filled = [], 0
        waiting.append(example)
        filled += example.length
    if waiting:
        yield waiting


def pack(examples: Sequence[Example], *, bos_id: int, image_id: int, pad_id: int) -> PackedSequence:
    """Lay out examples, whose images are pixels, one after another."""
    tokens = torch.full((SEQ_LENGTH,), pad_id)
    labels = torch.full((SEQ_LENGTH,), IGNORE)
    position_ids = torch.zeros(SEQ_LENGTH, dtype=torch.int64)
    segment_ids = torch.zeros(SEQ_LENGTH, dtype=torch.int32)
    start = 0
    for number, example in enumerate(examples):
        stop = start + example.length
        first_text = start + 1 + TOKENS_PER_IMAGE
        ids = torch.tensor(example.ids)
        tokens[start] = bos_id
        tokens[start + 1 : first_text] = image_id
        tokens[first_text:stop] = ids
        labels[first_text - 1 : stop - 1] = ids
        position_ids[start:stop] = torch.arange(stop - start)
        segment_ids[start:stop] = number + 1
        start = stop
    return PackedSequence(tokens, labels, position_ids, segment_ids, torch.stack([e.image for e in examples]))
