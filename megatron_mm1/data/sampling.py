"""A part of the text of large data sets, taken evenly over their shards."""

from collections.abc import Iterator, Sequence

from megatron_mm1.data.readers import Reader
from megatron_mm1.data.records import Document, Rejected, Text


def sample_texts(readers: Sequence[Reader], *, max_bytes: int) -> Iterator[str]:
    """Texts of about `max_bytes` in UTF-8: of each shard its beginning, as much as its share of the bytes.

    What a shard does not have, the shards behind it give. Each may give one document more.
    Records that cannot be used are passed over.
    """
    shards = [(reader, shard) for reader in readers for shard in reader.shards()]
    unread = sum(max(shard.size, 1) for _, shard in shards)
    for reader, shard in shards:
        size = max(shard.size, 1)
        quota = max_bytes * size // unread
        taken = 0
        for text in _texts(reader.read(shard)):
            if taken >= quota:
                break
            yield text
            taken += len(text.encode())
        unread, max_bytes = unread - size, max(0, max_bytes - taken)


def _texts(records: Iterator[Document | Rejected]) -> Iterator[str]:
    for record in records:
        if isinstance(record, Document):
            yield from (part.text for part in record.parts if isinstance(part, Text))
