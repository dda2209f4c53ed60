"""A document: text and images in reading order. Every kind of training data is turned into these by a reader."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A run of text.

    Attributes:
        trained: whether its tokens are targets of the loss; a question's are not, its answer's are.
    """

    text: str
    trained: bool = True


@dataclass(frozen=True)
class Image:
    """An image as its encoded bytes (JPEG, PNG, WebP, ..)."""

    data: bytes


@dataclass(frozen=True)
class Document:
    """One training example. Attention never crosses from one document to another.

    Attributes:
        parts: text and images in reading order.
        key: says where the document came from, for messages.
    """

    parts: tuple[Text | Image, ...]
    key: str
