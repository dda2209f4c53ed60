"""What a checkpoint folder is: there whole or not at all, and every byte of it vouched for.

    step-00001000/
      *.distcp, .metadata   tensors by name, whatever layout wrote them (torch.distributed.checkpoint)
      metadata.json         megatron-core's name of that form
      mm1.json              what the checkpoint is: `CheckpointMetadata`
      manifest.json         size and SHA-256 of every other file; written last

A save goes to `.step-00001000.partial`, which is renamed once its manifest is in place; the file `latest`, which names
the newest checkpoint, moves after that. A process killed at any moment leaves the previous checkpoint as it was.

Tensors have megatron-core's names under `tower.`, `connector.` and `language_model.`; the optimizer's are those of the
parameters behind `optimizer.state.exp_avg.`, `optimizer.state.exp_avg_sq.` and, in bf16, `optimizer.state.fp32_param.`.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_mm1 import __version__
from megatron_mm1.checkpoint.files import exchange, sync
from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.config.serialization import from_dict
from megatron_mm1.errors import UserError

FORMAT_VERSION = 2
METADATA = "mm1.json"
MANIFEST = "manifest.json"
LATEST = "latest"
OPTIMIZER_PREFIX = "optimizer.state."
_OLD_MANIFEST = "integrity.json"  # of format 1: megatron-core's, without sizes
_BLOCK = 1 << 20  # bytes hashed at a time: few enough for a cache, enough not to keep other threads waiting


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What `mm1.json` holds.

    Attributes:
        iteration: optimizer steps taken.
        consumed_sequences: sequences of the training plan already seen.
        config: the run's configuration.
        tokenizer_fingerprint: SHA-256 of the tokenizer model; empty where weights came without one.
        plan_fingerprint: of the training plan, the order in which sequences are seen.
        components: parts of the model whose weights are here.
        has_training_state: whether optimizer, schedule and random state are here too.
        wandb_run_id: the run's in Weights & Biases, to log on under it.
        world_size: processes that wrote it; None: not recorded.
        grad_norms: of the last updates, from which the next ones' spikes are told; empty where nobody looks for them.
    """

    iteration: int
    consumed_sequences: int
    config: dict[str, Any]
    tokenizer_fingerprint: str
    plan_fingerprint: str
    components: tuple[str, ...] = tuple(COMPONENTS)
    has_training_state: bool = True
    wandb_run_id: str | None = None
    world_size: int | None = None
    grad_norms: tuple[float, ...] = ()
    format_version: int = FORMAT_VERSION
    code_version: str = __version__

    def mm1_config(self) -> MM1Config:
        """The configuration as it was when the checkpoint was written."""
        return from_dict(self.config)


@dataclass(frozen=True)
class FileRecord:
    """Size (None: not recorded) and SHA-256 of a file."""

    size: int | None
    sha256: str


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest complete one in it or in its `checkpoints`.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if is_complete(path):
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            name = (folder / LATEST).read_text().strip()
            for candidate in (name, _replaced(name)) if name == PurePosixPath(name).name else ():
                if is_complete(folder / candidate):
                    return folder / candidate
            raise UserError(
                f"{folder / LATEST} names {name}, which is missing or incomplete: name another checkpoint of {folder}"
            )
    if (path / METADATA).is_file():
        raise UserError(f"{path} is incomplete: {MANIFEST}, which is written last, is missing")
    raise UserError(f"no checkpoint at {path}: expected a folder with {METADATA}, or one with a file {LATEST!r}")


def is_complete(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose writing has ended."""
    return (folder / METADATA).is_file() and any((folder / name).is_file() for name in (MANIFEST, _OLD_MANIFEST))


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """Read `mm1.json`.

    Raises:
        UserError: it is damaged or of a newer format.
    """
    try:
        fields = json.loads((checkpoint / METADATA).read_text())
        version = fields["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{checkpoint} has format {version}, newer than this program's {FORMAT_VERSION}: "
                f"upgrade to {fields['code_version']} or later"
            )
        for name in {"components", "grad_norms"} & set(fields):
            fields[name] = tuple(fields[name])
        return CheckpointMetadata(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"corrupt checkpoint {checkpoint}: {METADATA} cannot be read ({error})") from error


def read_manifest(checkpoint: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint.

    Raises:
        UserError: the manifest is damaged, or names a file outside the folder.
    """
    try:
        if (checkpoint / MANIFEST).is_file():
            files = json.loads((checkpoint / MANIFEST).read_text())["files"]
            records = {name: FileRecord(int(entry["bytes"]), entry["sha256"]) for name, entry in files.items()}
        else:
            files = json.loads((checkpoint / _OLD_MANIFEST).read_text())["files"]
            records = {name: FileRecord(None, sha256) for name, sha256 in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"corrupt checkpoint {checkpoint}: its manifest cannot be read ({error})") from error
    for name in records:
        if name != PurePosixPath(name).name or name in ("", ".", ".."):
            raise UserError(f"corrupt checkpoint {checkpoint}: its manifest names {name!r}, a path out of the folder")
    return records


def digest_of(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which tells it from any other, in hexadecimal."""
    manifest = checkpoint / MANIFEST
    return hashlib.sha256((manifest if manifest.is_file() else checkpoint / _OLD_MANIFEST).read_bytes()).hexdigest()


def record_of(path: Path) -> FileRecord:
    """Read a file for its record."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return FileRecord(path.stat().st_size, digest.hexdigest())


def verify_files(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest: all of them, or those named.

    Raises:
        UserError: naming every file that is missing, cut short or altered.
    """
    records = read_manifest(checkpoint)
    faults = []
    for name in records if names is None else names:
        record, path = records[name], checkpoint / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif record.size is not None and path.stat().st_size != record.size:
            faults.append(f"{name} has {path.stat().st_size} bytes, not {record.size}")
        elif record_of(path).sha256 != record.sha256:
            faults.append(f"{name} is not what was written (SHA-256 differs)")
    if faults:
        raise UserError(f"cannot load checkpoint {checkpoint}: {'; '.join(faults)}: use another one")


def begin(folder: Path, iteration: int) -> Path:
    """An empty folder for the files of a checkpoint that `commit` will put in place."""
    partial = folder / f".step-{iteration:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def sweep(folder: Path) -> None:
    """Remove what saves that were killed left in a folder that nothing else writes to now."""
    for left_over in folder.glob(".step-*.partial"):
        shutil.rmtree(left_over)


def commit(partial: Path, metadata: CheckpointMetadata, records: Mapping[str, FileRecord]) -> Path:
    """Put the checkpoint written to `partial` in its place and move `latest` to it.

    Args:
        records: of files already on disk and read for their checksum; those that are not named here are read now.

    Returns:
        The checkpoint's folder.
    """
    (partial / METADATA).write_text(json.dumps(asdict(metadata), indent=1))
    names = sorted(path.name for path in partial.iterdir())
    files = {name: records.get(name) or record_of(partial / name) for name in names}
    for name in set(names) - set(records):
        sync(partial / name)
    manifest = {name: {"bytes": record.size, "sha256": record.sha256} for name, record in files.items()}
    (partial / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1))
    sync(partial / MANIFEST)
    folder, name = partial.parent, partial.name.removeprefix(".").removesuffix(".partial")
    final, replaced = folder / name, folder / _replaced(name)
    exchange(partial, final, replaced=replaced)
    make_latest(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def make_latest(checkpoint: Path) -> None:
    """Move `latest` to a checkpoint beside it."""
    folder = checkpoint.parent
    temporary = folder / f".{LATEST}.partial"
    temporary.write_text(f"{checkpoint.name}\n")
    sync(temporary)
    temporary.replace(folder / LATEST)
    sync(folder)


def checkpoint_before(folder: Path, iteration: int) -> Path | None:
    """The newest checkpoint of a run after at most so many steps; None: there is none."""
    found = [path for step, path in _by_step(folder).items() if step <= iteration and is_complete(path)]
    return found[-1] if found else None


def prune(folder: Path, keep_last: int, *, keep_every: int | None = None) -> list[str]:
    """Remove all but the newest checkpoints, those at multiples of `keep_every` steps and the one `latest` names.

    What a run that has gone back has left behind `latest` is left alone: it takes its place again.

    Returns:
        The names of those removed.
    """
    latest = (folder / LATEST).read_text().strip()
    steps = {step: path for step, path in _by_step(folder).items() if path.name <= latest}
    kept = set(list(steps)[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
    removed = [path for step, path in steps.items() if step not in kept and path.name != latest]
    for path in removed:
        doomed = path.with_name(f".{path.name}.partial")  # out of sight at once, and swept up if this is cut short
        path.rename(doomed)
        shutil.rmtree(doomed)
    return [path.name for path in removed]


def _by_step(folder: Path) -> dict[int, Path]:
    """What is called a checkpoint in a folder, by steps taken, in their order."""
    return {int(path.name.removeprefix("step-")): path for path in sorted(folder.glob("step-" + "[0-9]" * 8))}


def _replaced(name: str) -> str:
    """What a checkpoint is called while another takes its place."""
    return f".{name}.replaced"
