"""Reading a distributed checkpoint without running code that somebody put into it.

torch keeps such a checkpoint's table of contents, `.metadata`, as a pickle, and a pickle may call anything. Here it may
name the classes that torch's own writer puts there and nothing else. The objects beside the tensors are pickles too,
which torch and megatron-core load without restriction: `check_checkpoint` reads them first, restricted.
"""

import importlib
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_mm1.errors import UserError

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_CLASSES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    (_MEGATRON, "MCoreMetadata"),  # of checkpoints before megatron-core 0.16
    (_MEGATRON, "MCoreSavePlan"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # as Python 3.13 calls it
}
_LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError)
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def read_dcp_metadata(folder: Path) -> Metadata:
    """The table of contents of a distributed checkpoint.

    Raises:
        UserError: it is missing, damaged, names anything that is no part of such a table, or names a file outside the
            folder.
    """
    path = folder / METADATA_FILE
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no distributed checkpoint: it has no {METADATA_FILE}") from error
    except UserError as error:
        raise UserError(f"refusing to read {path}: {error}") from error
    except Exception as error:  # whatever damaged bytes bring about
        raise UserError(f"corrupt checkpoint {folder}: {METADATA_FILE} cannot be read ({error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"corrupt checkpoint {folder}: {METADATA_FILE} holds no table of tensors")
    outside = sorted({repr(name) for name in _files(metadata) if not _is_plain(name)})
    if outside:
        raise UserError(f"refusing to read {folder}: {METADATA_FILE} names files outside of it: {', '.join(outside)}")
    return metadata


def read_object(folder: Path, metadata: Metadata, name: str) -> bytes:
    """The bytes of an object (what is no tensor) of a distributed checkpoint."""
    info = metadata.storage_data[MetadataIndex(name)]
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        return file.read(info.length)


def object_names(metadata: Metadata) -> list[str]:
    """Everything in the table that is no tensor."""
    return [name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]


def check_checkpoint(folder: Path) -> Metadata:
    """Refuse a distributed checkpoint that megatron-core could not read without running code from it.

    Returns:
        Its table of contents.

    Raises:
        UserError: as `read_dcp_metadata`, or naming every object that holds more than tensors and plain values.
    """
    metadata = read_dcp_metadata(folder)
    faults = []
    for name in object_names(metadata):
        try:
            load_object(read_object(folder, metadata, name))
        except _LOAD_ERRORS as error:
            faults.append(f"{name} ({_reason(error)})")
    if (folder / "common.pt").exists():  # which megatron-core would prefer to the table
        try:
            torch.load(folder / "common.pt", weights_only=True)
        except _LOAD_ERRORS as error:
            faults.append(f"common.pt ({_reason(error)})")
    if faults:
        raise UserError(
            f"refusing to read {folder}, whose objects are damaged or hold more than tensors and plain values: "
            f"{'; '.join(faults)}"
        )
    return metadata


def load_object(data: bytes) -> Any:
    """What an object of a checkpoint holds: tensors, numbers, text and containers of them.

    Raises:
        pickle.UnpicklingError: it holds anything else.
    """
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu") if data else None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and name in _DTYPES):
            if module.startswith("megatron."):
                importlib.import_module("megatron_mm1.parallel")  # readies the process for megatron-core
            return getattr(importlib.import_module(module), name)
        raise UserError(f"it is a pickle that wants {module}.{name}, which no table of tensors needs")


def _files(metadata: Metadata) -> Iterator[str]:
    for info in metadata.storage_data.values():
        yield str(getattr(info, "relative_path", ""))


def _is_plain(name: str) -> bool:
    return name == PurePosixPath(name).name and name not in ("", ".", "..") and "\\" not in name


def _reason(error: BaseException) -> str:
    """torch's message without its advice to load the file unrestricted."""
    text = str(error)
    wanted = re.search(r"Unsupported global: GLOBAL (\S+)|Unsupported (?:class|operand) .*", text)
    return wanted[0] if wanted else re.sub(r"\s+", " ", text)[:200]
