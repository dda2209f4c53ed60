"""Folders that `energon prepare` of megatron-energon has prepared, read as they are."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.readers.base import Reader, RejectRecord, Row, Shard, convert
from megatron_mm1.data.readers.fields import clean_text, decode_text, parse_json
from megatron_mm1.data.readers.jsonlines import question_document
from megatron_mm1.data.readers.tars import IMAGE_EXTENSIONS, Sample, read_samples
from megatron_mm1.data.records import Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError

META = ".nv-meta"
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


class Energon(Reader):
    """WebDataset shards below a folder with `.nv-meta`: which of them form a split, and what their members mean.

    Reads samples of `CaptioningSample`, `VQASample` (the answer of the largest weight, or the first) and
    `InterleavedSample` with a `field_map`. An entry of an interleaved `sequence` (a list in a JSON member) is a text,
    or the image of the sample's member that it names by extension ("0.jpg").

    Args:
        split: train, val, test or whatever `split.yaml` calls it.
    """

    def __init__(self, path: Path, *, split: str = "train") -> None:
        super().__init__(path)
        config = _load(path, "dataset.yaml")
        sample_type = _class_name(config.get("sample_type") or config)
        if sample_type not in _SAMPLES:
            raise UserError(_unsupported(sample_type))
        if not isinstance(config.get("field_map"), dict):
            raise UserError(
                f"{path / META / 'dataset.yaml'} has no field_map: its sample_loader is Python code, which is not run; "
                "replace it by a field_map, or read the shards with the reader `webdataset`"
            )
        required, self._build = _SAMPLES[sample_type]
        self._fields = {name: _accesses(text) for name, text in config["field_map"].items()}
        if missing := required - self._fields.keys():
            raise UserError(f"{path / META / 'dataset.yaml'}: field_map lacks {', '.join(sorted(missing))}")
        self._shards, self._excluded = _split(path, split)
        if sample_type == "InterleavedSample":
            self.filters = InterleavedFilters()

    def shards(self) -> list[Shard]:
        shards = []
        for name in self._shards:
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file} is listed in {self.path / META} but does not exist")
            shards.append(Shard(name, file, file.stat().st_size))
        return shards

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        members = {access[0] for accesses in self._fields.values() for access in accesses}
        interleaved = "sequence" in self._fields
        samples = read_samples(shard, lambda name: name in members or (interleaved and _is_image(name)))
        return convert(self._included(samples, shard), self._document)

    def _included(self, samples: Iterator[Sample | Rejected], shard: Shard) -> Iterator[Row | Rejected]:
        """Samples that the split does not exclude by "<shard>/<name>"."""
        for sample in samples:
            if isinstance(sample, Rejected):
                yield sample
            elif f"{shard.name}/{sample.name}" not in self._excluded:
                yield Row(sample.key, sample)

    def _document(self, sample: Sample, key: str) -> Document:
        fields = {name: _first_found(sample, accesses) for name, accesses in self._fields.items()}
        return self._build(fields, sample)


def _captioning(fields: Mapping[str, Any], sample: Sample) -> Document:
    return Document((_image(fields["image"]), Text(_text(fields["caption"]))), sample.key)


def _vqa(fields: Mapping[str, Any], sample: Sample) -> Document:
    answers, weights = fields["answers"], fields.get("answer_weights")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers:
        raise RejectRecord(Reason.INCOMPLETE_SAMPLE, "no answer")
    best = 0
    if isinstance(weights, list):
        if len(weights) != len(answers) or not all(isinstance(weight, int | float) for weight in weights):
            raise RejectRecord(
                Reason.WRONG_FIELDS, f"not a number in answer_weights for each of {len(answers)} answers"
            )
        best = max(range(len(weights)), key=weights.__getitem__)
    return question_document(_image(fields["image"]), _text(fields["context"]), _text(answers[best]), key=sample.key)


def _interleaved(fields: Mapping[str, Any], sample: Sample) -> Document:
    sequence = fields["sequence"]
    if not isinstance(sequence, list) or not sequence:
        raise RejectRecord(Reason.WRONG_FIELDS, "sequence is no list with entries")
    parts: list[Text | Image] = []
    for entry in sequence:
        named = isinstance(entry, str) and _is_image(entry.lower()) and entry.lower() in sample.parts
        parts.append(_image(sample.parts[entry.lower()]) if named else Text(_text(entry)))
    return Document(tuple(parts), sample.key)


_Build = Callable[[Mapping[str, Any], Sample], Document]
_SAMPLES: dict[str, tuple[set[str], _Build]] = {
    "CaptioningSample": ({"image", "caption"}, _captioning),
    "VQASample": ({"image", "context", "answers"}, _vqa),
    "InterleavedSample": ({"sequence"}, _interleaved),
}
"""Fields that a sample must have, and the document they make."""


def _load(path: Path, *names: str) -> dict[str, Any]:
    """The mapping in the first of the files `names` below `.nv-meta` that exists."""
    for name in names:
        file = path / META / name
        try:
            text = file.read_text()
            config = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{file} holds no mapping")
        return config
    raise UserError(
        f"no {META}/{' or '.join(names)} in {path}: run `energon prepare`, or read it with the reader `webdataset`"
    )


def _split(path: Path, split: str) -> tuple[list[str], set[str]]:
    """Shards of a split, and what is excluded from it; brace expressions stand for several names."""
    counts = _load(path, ".info.json", ".info.yaml").get("shard_counts")
    splits = _load(path, "split.yaml", "split.json")
    parts = splits.get("split_parts")
    if not isinstance(counts, dict) or not isinstance(parts, dict):
        raise UserError(f"{path / META}: shard_counts or split_parts is missing: run `energon prepare` again")
    if split not in parts:
        raise UserError(f"{path} has no split {split!r}: it has {', '.join(map(str, parts))}")
    excluded = _expanded(splits.get("exclude"), path)
    shards = [name for name in _expanded(parts[split], path) if name not in set(excluded)]
    if not shards:
        raise UserError(f"split {split!r} of {path} has no shards")
    root = path.resolve()
    for name in shards:
        if name not in counts:
            raise UserError(f"shard {name} of split {split!r} is unknown to {path / META}: run `energon prepare` again")
        if not (root / name).absolute().is_relative_to(root) or ".." in name.split("/"):
            raise UserError(f"shard {name} of split {split!r} lies outside of {path}")
    return shards, set(excluded)


def _expanded(names: Any, path: Path) -> list[str]:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path / META}: a split is no list of names")
    return [expanded for name in names or () for expanded in braceexpand(name)]


def _class_name(config: Mapping[str, Any]) -> str:
    """Of a sample; "CaptioningWebdataset" is how older folders write "CaptioningSample"."""
    name = str(config.get("__class__") if isinstance(config, dict) else config)
    return name if name == "CrudeWebdataset" else re.sub("Webdataset$", "Sample", name)


def _unsupported(sample_type: str) -> str:
    if sample_type == "CrudeWebdataset":
        return (
            "the folder holds CrudeWebdataset samples, whose meaning is in the code that trained on them: "
            "read its shards with the reader `webdataset`"
        )
    return f"energon samples of type {sample_type} are not read: only {', '.join(_SAMPLES)}"


def _accesses(text: Any) -> list[list[str]]:
    """Alternatives and steps of a field as energon writes it: "jpg,json[a][0]" is [["jpg"], ["json", "a", "0"]]."""
    accesses = []
    for option in str(text).split(","):
        match = _FIELD.fullmatch(option.strip())
        if match is None:
            raise UserError(f"field_map: {option!r} is no field such as jpg or json[caption]")
        accesses.append([match[1].lower(), *re.findall(r"\[([^\[\]]+)\]", match[2])])
    return accesses


def _first_found(sample: Sample, accesses: list[list[str]]) -> Any:
    """The first of alternative fields that a sample has.

    Raises:
        RejectRecord: it has none.
    """
    for extension, *steps in accesses:
        value: Any = sample.parts.get(extension)
        if value is not None and extension.rpartition(".")[2] == "json":
            value = parse_json(value)
        for step in steps:
            if isinstance(value, list):
                value = value[int(step)] if step.isdecimal() and int(step) < len(value) else None
            else:
                value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            return value
    wanted = ",".join(extension + "".join(f"[{step}]" for step in steps) for extension, *steps in accesses)
    raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"no {wanted}")


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _image(value: Any) -> Image:
    if not isinstance(value, bytes) or not value:
        raise RejectRecord(Reason.WRONG_FIELDS, "the image is no member of the sample")
    return Image(value)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return decode_text(value)
    if not isinstance(value, str):
        raise RejectRecord(Reason.WRONG_FIELDS, f"a {type(value).__name__} where a text was expected")
    return clean_text(value)
