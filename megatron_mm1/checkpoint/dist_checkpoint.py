"""Checkpoints of torch.distributed.checkpoint, which megatron-core uses, a tensor or some rows of it at a time.

A tensor lies there in chunks, whatever layout wrote them, each an archive of `torch.save` somewhere in a file. No
process group is needed, and no more is read than was asked for.
"""

import io
import math
import mmap
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_mm1.checkpoint.safe_pickle import object_names, read_dcp_metadata, read_object
from megatron_mm1.checkpoint.tensors import TensorInfo
from megatron_mm1.errors import UserError

COMMON_STATE = "common_state/shard_0_1"
"""megatron-core's object of everything that is neither tensor nor sharded."""
CONFIG_FILE = "metadata.json"
"""megatron-core's name of the form: what tells its checkpoints from torch's."""
_READ_BYTES = 1 << 30  # at a time; Linux reads no more than 2 GB


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the archive that holds it.

    Attributes:
        offsets, sizes: of the box, in each dimension.
        start, length: of the archive in the file, bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class DistCheckpoint:
    """A `TensorSource` over a folder of `.metadata` and `.distcp` files.

    Attributes:
        path: the folder.
        objects: names of what is no tensor.

    Raises:
        UserError: as `read_dcp_metadata`; when reading, if a file is damaged or chunks of a tensor are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = read_dcp_metadata(path)
        self._stored: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._tensors = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype) for name, stored in self._stored.items()
        }
        self.objects = tuple(object_names(self._metadata))
        self._chunks = cache(self._find_chunks)
        self._layout = cache(self._read_layout)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def num_chunks(self, name: str) -> int:
        return len(self._stored[name].chunks)

    def read_object(self, name: str) -> bytes:
        """The bytes of an object, a pickle of torch's that is not to be loaded but with `safe_pickle.load_object`."""
        self._check_file(self._metadata.storage_data[MetadataIndex(name)].relative_path)
        return read_object(self.path, self._metadata, name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info = self._tensors[name]
        if not info.shape:
            return self._read_rows(self._chunks(name)[0], info.dtype, 0, 1)
        first, last, step = (rows or slice(None)).indices(info.shape[0])
        if step != 1:
            raise ValueError(f"rows {rows} of {name}: only a step of 1 can be read")
        last = max(first, last)
        result: Tensor | None = None
        found = 0
        for chunk in self._chunks(name):
            begin = max(first, chunk.offsets[0])
            end = min(last, chunk.offsets[0] + chunk.sizes[0])
            if begin >= end:
                continue
            part = self._read_rows(chunk, info.dtype, begin - chunk.offsets[0], end - chunk.offsets[0])
            if tuple(part.shape) == (last - first, *info.shape[1:]):
                return part
            if result is None:
                result = torch.empty(last - first, *info.shape[1:], dtype=info.dtype)
            box = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            result[(slice(begin - first, end - first), *box[1:])] = part
            found += part.numel()
            del part
        if result is None:
            result = torch.empty(last - first, *info.shape[1:], dtype=info.dtype)
        if found != result.numel():
            raise UserError(f"corrupt checkpoint {self.path}: parts of {name} are missing")
        return result

    def _check_file(self, file: str) -> None:
        """Called before a file is read from."""

    def _find_chunks(self, name: str) -> list[Chunk]:
        chunks = {}
        for box in self._stored[name].chunks:
            info = self._metadata.storage_data.get(MetadataIndex(name, box.offsets))
            if info is None:
                raise UserError(f"corrupt checkpoint {self.path}: it does not say where a part of {name} is")
            if getattr(info, "transform_descriptors", None):
                raise UserError(f"{name} in {self.path} is stored with {info.transform_descriptors}: not supported")
            offsets, sizes = tuple(box.offsets), tuple(box.sizes)
            chunks[offsets, sizes] = Chunk(offsets, sizes, info.relative_path, info.offset, info.length)
        return list(chunks.values())

    def _read_rows(self, chunk: Chunk, dtype: torch.dtype, first: int, last: int) -> Tensor:
        """Rows of a chunk; of one without dimensions, all of it."""
        layout = self._layout(chunk)
        if layout.dtype != dtype or tuple(layout.shape) != chunk.sizes:
            raise self._damaged(chunk.file, f"a part has shape {tuple(layout.shape)} and type {layout.dtype}")
        if not layout.is_contiguous():
            with self._open(chunk.file) as file:
                whole: Tensor = torch.load(_archive(file, chunk), map_location="cpu", weights_only=True)
            return whole[first:last] if chunk.sizes else whole
        row_bytes = math.prod(chunk.sizes[1:]) * dtype.itemsize
        begin = int(layout.untyped_storage()._checkpoint_offset or 0) + int(layout.storage_offset()) * dtype.itemsize
        begin += first * row_bytes
        size = (last - first) * row_bytes
        shape = (last - first, *chunk.sizes[1:]) if chunk.sizes else ()
        with self._open(chunk.file) as file:
            if begin + size > chunk.length or chunk.start + chunk.length > os.fstat(file.fileno()).st_size:
                raise self._damaged(chunk.file, "it is cut short")
            return _read_tensor(file, chunk.start + begin, shape, dtype)

    def _read_layout(self, chunk: Chunk) -> Tensor:
        """A chunk's tensor without its data, but with the place of that in the archive."""
        try:
            with self._open(chunk.file) as file:
                layout = torch.load(_archive(file, chunk), map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, io.UnsupportedOperation) as error:
            raise self._damaged(chunk.file, (str(error) or type(error).__name__).splitlines()[0]) from error
        if not isinstance(layout, Tensor):
            raise self._damaged(chunk.file, "a part is no tensor")
        return layout

    def _open(self, file: str) -> BinaryIO:
        self._check_file(file)
        try:
            return (self.path / file).open("rb")
        except OSError as error:
            raise UserError(f"corrupt checkpoint {self.path}: cannot read {file} ({error.strerror})") from error

    def _damaged(self, file: str, reason: str) -> UserError:
        return UserError(f"corrupt checkpoint {self.path}: {file} is damaged ({reason})")


def is_dist_checkpoint(path: Path) -> bool:
    """Whether this is a folder as megatron-core writes it."""
    return (path / CONFIG_FILE).is_file()


def _archive(file: BinaryIO, chunk: Chunk) -> IO[bytes]:
    return cast(IO[bytes], _create_file_view(cast(io.IOBase, file), chunk.start, chunk.length))


def _read_tensor(file: BinaryIO, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose bytes lie in a file: mapped, where they lie as memory wants them, and copied elsewhere."""
    count = math.prod(shape)
    if count and start % dtype.itemsize == 0:
        page = start % mmap.ALLOCATIONGRANULARITY
        # A private mapping: whoever should write to the tensor against the rules does not write to the file.
        mapped = mmap.mmap(file.fileno(), page + count * dtype.itemsize, offset=start - page, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=page).reshape(shape)
    tensor = torch.empty(shape, dtype=dtype)
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    while data:
        read = os.preadv(file.fileno(), [data[:_READ_BYTES]], start)
        data, start = data[read:], start + read
    return tensor
