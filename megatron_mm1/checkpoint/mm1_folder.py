"""MM1 checkpoints read and written a piece at a time, without a process group and without megatron-core."""

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from megatron_mm1.checkpoint import format
from megatron_mm1.checkpoint.dist_checkpoint import COMMON_STATE, CONFIG_FILE, DistCheckpoint
from megatron_mm1.checkpoint.files import disk_errors, refuse_existing, removed_on_failure
from megatron_mm1.checkpoint.format import CheckpointMetadata, FileRecord
from megatron_mm1.checkpoint.safe_pickle import METADATA_FILE
from megatron_mm1.checkpoint.streamed_file import StreamedFile
from megatron_mm1.checkpoint.tensors import Plan, PlannedTensor, read_pieces
from megatron_mm1.errors import UserError

MAX_FILE_BYTES = 5 * 10**9
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_ALIGNMENT = 64  # of archives in a file; torch aligns the data in an archive so, which can then be mapped


class MM1Checkpoint(DistCheckpoint):
    """A `TensorSource` over an MM1 checkpoint.

    Files are compared with the manifest by another thread, from when they are first read; whoever keeps what was read
    calls `verify` before it counts.

    Args:
        path: a checkpoint, or a folder of them (the newest is taken).

    Attributes:
        metadata: what its `mm1.json` says.

    Raises:
        UserError: there is no checkpoint, it is not complete, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        folder = format.find_checkpoint(path)
        self.metadata = format.read_metadata(folder)
        self._vouched_for = set(format.read_manifest(folder))
        self._verified: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1)
        if METADATA_FILE in self._vouched_for:
            format.verify_files(folder, [METADATA_FILE])
        super().__init__(folder)

    def read_objects(self, prefixes: tuple[str, ...]) -> dict[str, bytes]:
        """Objects by name, of those whose names begin so."""
        return {name: self.read_object(name) for name in self.objects if name.startswith(prefixes)}

    def verify(self) -> None:
        """Wait until every file that was read from is compared with the manifest.

        Raises:
            UserError: one of them is not what was written; each is named.
        """
        errors = [future.exception() for future in self._verified.values()]
        faults = [str(error) for error in errors if isinstance(error, UserError)]
        for error in errors:
            if error is not None and not isinstance(error, UserError):
                raise error
        if faults:
            raise UserError("; ".join(faults))

    def _check_file(self, file: str) -> None:
        if file not in self._vouched_for:
            raise UserError(f"corrupt checkpoint {self.path}: its manifest does not know {file}")
        if file not in self._verified:
            self._verified[file] = self._thread.submit(format.verify_files, self.path, [file])


def write_mm1(
    folder: Path,
    plan: Plan,
    metadata: CheckpointMetadata,
    *,
    objects: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Carry a plan out into `folder/step-<iteration>`, which is there whole or not at all, and move `latest` to it.

    A piece becomes a chunk of the checkpoint. One is in memory at a time, beside the one before while that is hashed.

    Args:
        objects: bytes by name of what is no tensor, as `MM1Checkpoint.read_objects` has them; `COMMON_STATE` is empty
            unless it is here.
        overwrite: write into a folder that has something in it, and replace a checkpoint of this step.
        max_file_bytes: of tensors, after which another file is begun.
        before_commit: called when all is written; if it raises, there will be no checkpoint.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: `folder` is not empty, or the disk refuses.
    """
    refuse_existing(folder, overwrite=overwrite)
    with disk_errors(folder):
        partial = format.begin(folder, metadata.iteration)
        with removed_on_failure(partial):
            files = _Files(partial, max_file_bytes)
            contents = _write_contents(files, plan, {COMMON_STATE: _no_state(), **(objects or {})})
            (partial / METADATA_FILE).write_bytes(pickle.dumps(contents))
            (partial / CONFIG_FILE).write_text(json.dumps(_BACKEND))
            before_commit()
            return format.commit(partial, metadata, files.records)


def _write_contents(files: "_Files", plan: Plan, objects: Mapping[str, bytes]) -> Metadata:
    """Write objects and tensors; the table of them."""
    stored: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    with files.closing():
        for name, content in objects.items():
            stored[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = files.add(content)
        for planned in plan:
            stored[planned.name] = TensorStorageMetadata(
                TensorProperties(dtype=planned.info.dtype), torch.Size(planned.info.shape), []
            )
            for box, place in _write_tensor(files, planned):
                number = len(stored[planned.name].chunks)
                stored[planned.name].chunks.append(box)
                places[MetadataIndex(planned.name, box.offsets, number)] = place
    return Metadata(stored, planner_data={}, storage_data=places, storage_meta=StorageMeta())


def _write_tensor(files: "_Files", planned: PlannedTensor) -> Iterator[tuple[ChunkStorageMetadata, Any]]:
    for row, tensor in read_pieces(planned):
        offsets = (row, *(0 for _ in planned.info.shape[1:])) if planned.info.shape else ()
        box = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
        yield box, files.add(tensor)
        del tensor


def _no_state() -> bytes:
    buffer = io.BytesIO()
    torch.save([{}], buffer)
    return buffer.getvalue()


class _Files:
    """The `.distcp` files of a checkpoint, one after the other.

    Attributes:
        records: size and checksum of each that is closed.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._file: StreamedFile | None = None
        self.records: dict[str, FileRecord] = {}

    def add(self, content: bytes | Tensor) -> Any:
        """Append an archive; where it is, as torch's table has it."""
        if self._file is not None and self._file.size >= self._max_bytes:
            self._close()
        if self._file is None:
            self._file = StreamedFile(self._folder / f"__0_{len(self.records)}.distcp", checksum=True)
        file = self._file
        file.write(b"\0" * (-file.size % _ALIGNMENT))
        start = file.size
        if isinstance(content, bytes):
            file.write(content)
        else:
            _save(content, file)
        return _StorageInfo(file.path.name, start, file.size - start)

    @contextmanager
    def closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.records[self._file.path.name] = FileRecord(self._file.size, self._file.sha256())
            self._file = None


def _save(tensor: Tensor, file: StreamedFile) -> None:
    try:
        # The manifest's SHA-256 vouches for the data; a second checksum of it would only take time.
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            tensor = _alone(tensor)
            torch.save(tensor, cast(IO[bytes], _Archive(file, tensor)))
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch complains that the archive has no end
            raise error.__context__ from None
        raise


class _Archive:
    """What torch.save writes a tensor to: its data, which lasts, may go through the checksum later."""

    def __init__(self, file: StreamedFile, tensor: Tensor) -> None:
        self._file = file
        self._data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else None

    def write(self, content: Any) -> int:
        found = np.frombuffer(content, np.uint8)
        data = self._data
        if data is not None and found.ctypes.data == data.ctypes.data and found.nbytes == data.nbytes:
            return self._file.write(data, lasting=True)
        return self._file.write(content)

    def flush(self) -> None:
        """Nothing: the file is whole when it is closed."""


def _alone(tensor: Tensor) -> Tensor:
    """The tensor over memory of no more than its own size, all of which torch.save would write."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if tensor.numel() == 0:
        return tensor.clone()
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)
