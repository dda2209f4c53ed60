"""Documents: text and images in reading order. Every kind of training data is turned into these by a reader."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Text:
    """A run of text.

    Attributes:
        trained: whether its tokens are targets of the loss; a question's are not, its answer's are.
        spans: stretches (start, stop) of its characters that are trained where not all is; a token that is partly in
            one is a target.
    """

    text: str
    trained: bool = True
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Control:
    """A control symbol of the tokenizer ("</s>", "<|assistant|>"), which no text encodes to.

    Attributes:
        trained: whether it is a target of the loss.
    """

    symbol: str
    trained: bool = False


@dataclass(frozen=True)
class Image:
    """An image as its encoded bytes (JPEG, PNG, WebP, ..).

    Attributes:
        url: where it came from, for the filters; empty where unknown.
    """

    data: bytes
    url: str = ""


class Reason(StrEnum):
    """Why a record, or an image of a document, is left out of prepared data."""

    NOT_JSON = "not JSON"
    WRONG_FIELDS = "fields missing or of the wrong type"
    NOT_UTF8 = "text is not valid UTF-8"
    NUL_BYTES = "text contains NUL bytes"
    BLANK_TEXT = "blank text"
    MISSING_IMAGE = "image file missing or unreadable"
    OUTSIDE_FOLDER = "image path leaves the folder"
    IMAGE_MARKS = "image marks and images do not match"
    CHAT_TEMPLATE = "the chat template refuses it"
    DUPLICATE_KEY = "duplicate key"
    UNSAFE_MEMBER = "archive member with an unsafe path or type"
    INCOMPLETE_SAMPLE = "sample without an image or a text"
    RECORD_TOO_LARGE = "record larger than 256 MiB"
    IMAGE_PLACE = "image without a place in the text"
    TRUNCATED_FILE = "rest of a truncated or damaged file"
    EMPTY_FILE = "file without a record"
    NOT_AN_IMAGE = "not an image"
    IMAGE_TOO_LARGE = "image too large"
    IMAGE_UNDECODABLE = "image cannot be decoded"
    NO_IMAGES = "no images"
    TOO_MANY_IMAGES = "too many images"
    ASPECT_RATIO = "aspect ratio"
    IMAGE_TOO_SMALL = "image too small"
    DECORATION = "image URL of a decoration"
    REPEATED_IN_DOCUMENT = "image repeated in its document"
    REPEATED_IN_CORPUS = "image repeated over the corpus"
    OTHER = "other"


@dataclass(frozen=True)
class Document:
    """One training example. Attention never crosses from one document to another.

    Attributes:
        parts: text, images and control symbols in reading order.
        key: says where the document came from, for messages.
        dropped_images: why images that stood in it were left out, one entry for each.
        complete: its parts are all of it: no symbols for beginning and end are put around them.
    """

    parts: tuple[Text | Image | Control, ...]
    key: str
    dropped_images: tuple[Reason, ...] = ()
    complete: bool = False


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used.

    Attributes:
        detail: what was found, for the quarantine file.
    """

    key: str
    reason: Reason
    detail: str = ""
