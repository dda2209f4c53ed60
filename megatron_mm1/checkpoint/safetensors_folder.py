"""Folders of safetensors files, as Hugging Face's libraries write and read them, a tensor or a piece at a time."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mm1.checkpoint.files import new_folder, sync
from megatron_mm1.checkpoint.streamed_file import StreamedFile
from megatron_mm1.checkpoint.tensors import Plan, PlannedTensor, TensorInfo, read_pieces
from megatron_mm1.errors import UserError

GB = 10**9
CONFIGS = ("config.json", "open_clip_config.json")
IMAGE_PROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFolder:
    """A `TensorSource` over a folder with one safetensors file, or several and their index; tensors are mapped.

    Attributes:
        config: what its `config.json` (open_clip: `open_clip_config.json`) holds.

    Raises:
        UserError: there is no safetensors file or no configuration, the weights are pickles, the index names a file
            outside the folder, or files or tensors are missing or damaged (all of them are named).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self._files: dict[str, Any] = {}
        self._file_of = self._find_tensors()
        self._tensors = {name: self._info(name) for name in self._file_of}

    @cached_property
    def image_processor(self) -> dict[str, Any] | None:
        """transformers' settings of its image processor; None: there are none.

        They are in a file of their own, or in that of the whole processor, which transformers 5 writes and reads first.
        """
        nested = (read_json(self.path / PROCESSOR) or {}).get("image_processor")
        return nested if isinstance(nested, dict) else read_json(self.path / IMAGE_PROCESSOR)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        file = self._files[self._file_of[name]]
        tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        return tensor

    def _find_tensors(self) -> dict[str, str]:
        """File of each tensor."""
        index = _find_index(self.path)
        if index is None:
            file = _single_file(self.path)
            return dict.fromkeys(self._open(file).keys(), file)
        weight_map = _read_index(index)
        faults = []
        for file in sorted(set(weight_map.values())):
            try:
                names = set(self._open(file).keys())
            except UserError as error:
                faults.append(str(error))
                continue
            lacking = sorted(name for name, where in weight_map.items() if where == file and name not in names)
            faults += [f"{file} lacks {name}, which {index.name} says is there" for name in lacking]
        if faults:
            raise UserError(f"cannot read {self.path}: {'; '.join(faults)}")
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except FileNotFoundError as error:
                raise UserError(f"{file} is missing from {self.path}") from error
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / file} is damaged or cut short ({error}): get it again") from error
        return self._files[file]

    def _info(self, name: str) -> TensorInfo:
        view = self._files[self._file_of[name]].get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{name} in {self.path / self._file_of[name]} has type {view.get_dtype()}: not supported")
        return TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])


def is_safetensors_folder(path: Path) -> bool:
    """Whether this is meant as a model folder of Hugging Face's form, readable or not."""
    suffixes = (".safetensors", *PICKLES)
    return path.is_dir() and any(file.name in CONFIGS or file.suffix in suffixes for file in path.iterdir())


def write_safetensors(
    folder: Path,
    plan: Plan,
    *,
    config: Mapping[str, Any],
    extra_files: Mapping[str, bytes | str] | None = None,
    max_shard_bytes: int = 5 * GB,
    overwrite: bool = False,
    stem: str = "model",
    config_name: str = CONFIGS[0],
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Carry a plan out into a folder that is there whole or not at all; one piece is in memory at a time.

    Args:
        extra_files: contents by name, beside weights and configuration.
        max_shard_bytes: of tensors in a file; with more than one file an index is written.
        overwrite: replace a folder that is there.
        stem, config_name: what the files of weights, and the configuration, are called.
        before_commit: called when all is written; if it raises, there will be no folder.

    Raises:
        UserError: the folder is there and not empty, a tensor has a type that safetensors lacks, or the disk refuses.
    """
    strange = [f"{planned.name} ({planned.info.dtype})" for planned in plan if planned.info.dtype not in _CODES]
    if strange:
        raise UserError(f"safetensors has no such types: {', '.join(strange)}")
    with new_folder(folder, overwrite=overwrite) as partial:
        shards = list(_shards(plan, max_shard_bytes))
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
            weight_map = {planned.name: name for name, shard in zip(names, shards, strict=True) for planned in shard}
            total = sum(planned.info.num_bytes for planned in plan)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_file(partial / f"{stem}.safetensors.index.json", json.dumps(index, indent=2))
        for name, shard in zip(names, shards, strict=True):
            with StreamedFile(partial / name) as file:
                _write_shard(file, shard)
        for name, content in {config_name: json.dumps(config, indent=2) + "\n", **(extra_files or {})}.items():
            _write_file(partial / name, content)
        before_commit()


def _shards(plan: Plan, max_bytes: int) -> Iterator[list[PlannedTensor]]:
    """The tensors of each file, in the order of the plan."""
    shard: list[PlannedTensor] = []
    size = 0
    for planned in plan:
        if shard and size + planned.info.num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(planned)
        size += planned.info.num_bytes
    yield shard


def _write_shard(file: StreamedFile, shard: Sequence[PlannedTensor]) -> None:
    # Wide types first: each tensor then starts at a multiple of its type's size.
    ordered = sorted(shard, key=lambda planned: -planned.info.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in ordered:
        start, end = end, end + planned.info.num_bytes
        code = _CODES[planned.info.dtype]
        header[planned.name] = {"dtype": code, "shape": planned.info.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for planned in ordered:
        for _, tensor in read_pieces(planned):
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor


def _write_file(path: Path, content: bytes | str) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(path)


def _read_config(folder: Path) -> dict[str, Any]:
    path = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has no {' or '.join(CONFIGS)}: expected a folder as transformers or open_clip has it"
        )
    return read_json(path) or {}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file.

    Raises:
        UserError: it holds no JSON object.
    """
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration")
    return config


def _find_index(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.safetensors.index.json"))
    return _only(folder, found, "model.safetensors.index.json") if found else None


def _single_file(folder: Path) -> str:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{folder} has its weights as pickles ({', '.join(pickles)}), which can run code when they are read: "
                f"convert them to safetensors first (in transformers: save_pretrained)"
            )
        raise UserError(f"{folder} has no safetensors file")
    return _only(folder, found, "model.safetensors").name


def _only(folder: Path, found: Sequence[Path], usual: str) -> Path:
    """The one file, or of several the one with the usual name."""
    if len(found) > 1 and folder / usual not in found:
        raise UserError(f"{folder} has several candidates ({', '.join(path.name for path in found)}): keep one")
    return found[0] if len(found) == 1 else folder / usual


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): get it again") from error
    outside = sorted({file for file in weight_map.values() if not _is_inside(file)})
    if outside:
        raise UserError(f"refusing {path}: it names files outside of its folder: {', '.join(map(repr, outside))}")
    return dict(weight_map)


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.suffix == ".safetensors"
