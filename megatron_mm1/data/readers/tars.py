"""WebDataset tar files: samples of members that share a name up to the first dot."""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from megatron_mm1.data.readers.base import MAX_RECORD, RejectRecord, Shard, printable
from megatron_mm1.data.records import Reason, Rejected

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif"))
_SAMPLE_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # as webdataset splits names
_META_NAME = re.compile(r"__[^/]*__(?:$|/)")  # webdataset's own members, no samples
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)


@dataclass
class Sample:
    """Members of one name.

    Attributes:
        key: the shard's name and the members' name up to its first dot.
        name: the latter alone, as the archive has it.
        parts: contents by extension in lower case, in the archive's order.
        size: bytes of `parts`.
        fault: why the sample cannot be used.
    """

    key: str
    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    fault: RejectRecord | None = None


def read_samples(shard: Shard, wanted: Callable[[str], bool]) -> Iterator[Sample | Rejected]:
    """Samples of a tar file in order, with the members whose extension is `wanted`; nothing is unpacked to disk.

    A member with an unsafe path or type is rejected, and so is a name that comes again after another. The rest of a
    damaged file is one `Rejected`, as is the missing mark that ends an archive: how much it lacks cannot be known.
    """
    sample: Sample | None = None
    seen: set[str] = set()
    found = False
    try:
        with shard.path.open("rb") as file:
            if not file.read(1):
                yield Rejected(shard.name, Reason.EMPTY_FILE, "0 bytes")
                return
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in _members(archive):
                    found = True
                    name = _SAMPLE_NAME.fullmatch(member.name)
                    if _unsafe(member) or name is None:
                        yield _refused(member, shard)
                        continue
                    if sample is None or sample.name != name[1]:
                        if sample is not None:
                            yield _finished(sample)
                        sample = Sample(f"{shard.name}/{printable(name[1])}", name[1])
                        if name[1] in seen:
                            sample.fault = RejectRecord(Reason.DUPLICATE_KEY)
                        seen.add(name[1])
                    if wanted(name[2].lower()):
                        _add(sample, name[2].lower(), archive, member)
                _check_end(file, archive.offset)
    except _DAMAGE as error:
        if sample is not None:
            yield _finished(sample)
        yield Rejected(shard.name, Reason.TRUNCATED_FILE, str(error))
        return
    if sample is not None:
        yield _finished(sample)
    if not found:
        yield Rejected(shard.name, Reason.EMPTY_FILE, "no member")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := archive.next():
        if archive.offset <= member.offset:
            raise tarfile.ReadError(f"the size of {member.name!a} leads back to what was read")
        if _unsafe(member) or not (member.isdir() or _META_NAME.match(member.name)):
            yield member
        archive.members.clear()  # type: ignore[attr-defined]  # or it keeps them all


def _unsafe(member: tarfile.TarInfo) -> bool:
    """Whether it is a link, a device or a sparse file, or lies outside the folder that it would be unpacked to."""
    regular = member.isdir() or (member.isreg() and not member.issparse())
    return not regular or member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name


def _refused(member: tarfile.TarInfo, shard: Shard) -> Rejected:
    key = f"{shard.name}/{printable(member.name)}"
    if _unsafe(member):
        return Rejected(key, Reason.UNSAFE_MEMBER, f"type {member.type!r}")
    return Rejected(key, Reason.INCOMPLETE_SAMPLE, "a member without an extension")


def _finished(sample: Sample) -> Sample | Rejected:
    return Rejected(sample.key, sample.fault.reason, sample.fault.detail) if sample.fault else sample


def _add(sample: Sample, extension: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Read a member into `sample`; a sample that has a fault is not read any further."""
    if sample.fault is not None:
        return
    sample.size += member.size
    content = archive.extractfile(member)
    if extension in sample.parts:
        sample.fault = RejectRecord(Reason.DUPLICATE_KEY, f"two members .{extension}")
    elif sample.size > MAX_RECORD or content is None:
        sample.fault = RejectRecord(Reason.RECORD_TOO_LARGE, f"{sample.size} bytes")
    else:
        try:
            sample.parts[extension] = content.read()
        except _DAMAGE as error:
            sample.fault = RejectRecord(Reason.TRUNCATED_FILE, str(error))
            raise


def _check_end(file: BinaryIO, offset: int) -> None:
    """What tarfile takes for the end must be one: it ends as quietly at a damaged header.

    Raises:
        tarfile.ReadError: there is something else at `offset`.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block.count(0) != tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no member's header and no end of the archive at byte {offset}")
