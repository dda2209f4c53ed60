"""The machine itself: processors, memory, disk and limits."""

import os
import re
import resource
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from megatron_mm1.doctor.finding import Finding, Settings, State

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = GIB
"""What NVIDIA's images ask for; a container engine's own choice is 64 MiB."""
RUN_BYTES = GIB
"""The quickstart leaves 102 MB of checkpoints, logs and results, and its corpus is 243 MB."""
MEMORY_BYTES = 3 * GIB
"""The quickstart's two processes took 2.0 GB together when they started to train."""
PROBE_BYTES = 64 << 20
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def probe_processors(settings: Settings) -> list[Finding]:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{usable}" if usable == there else f"{usable} of the machine's {there}"
    if usable < 2:
        costs, fix = "the quickstart's two processes take turns", "on Slurm, --cpus-per-task=2"
        return [Finding(name="CPU cores", state=State.LIMITED, found=found, costs=costs, fix=fix)]
    return [Finding(name="CPU cores", state=State.OK, found=found, facts={"count": usable})]


def probe_memory(settings: Settings) -> list[Finding]:
    """Facts: `total_bytes` and `available_bytes`, of the container or job where it has a limit."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        total, available = limit, min(available, limit)
    found = f"{total / GIB:.1f} GiB, {available / GIB:.1f} free"
    facts = {"total_bytes": total, "available_bytes": available}
    if available < MEMORY_BYTES:
        found += f", the quickstart needs {MEMORY_BYTES / GIB:.1f}"
        costs, fix = "processes are killed when it runs out", "on Slurm, --mem; in a container, its memory limit"
        return [Finding(name="memory", state=State.FAILED, found=found, costs=costs, fix=fix, facts=facts)]
    return [Finding(name="memory", state=State.OK, found=found, facts=facts)]


def _cgroup_limit() -> int | None:
    for file in map(Path, CGROUP_LIMITS):
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            return int(text)
    return None


def probe_shared_memory(settings: Settings) -> list[Finding]:
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if usage.free >= SHARED_MEMORY_BYTES:
        return [Finding(name="/dev/shm", state=State.OK, found=found)]
    costs = "NCCL and workers that read data may end with a bus error"
    fix = "in Docker or podman --ipc=host, or --shm-size=1g a GPU; else mount -o remount,size=50% /dev/shm"
    return [Finding(name="/dev/shm", state=State.LIMITED, found=found, costs=costs, fix=fix)]


def probe_open_files(settings: Settings) -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft}, at most {hard}"
    if soft >= 1024:
        return [Finding(name="open files", state=State.OK, found=found)]
    costs = "readers of many shards fail, and rank 0, which has a connection to every rank"
    return [Finding(name="open files", state=State.LIMITED, found=found, costs=costs, fix="ulimit -n 65536")]


def probe_disk(settings: Settings) -> list[Finding]:
    """Room, and the speed of writing, where runs go. Facts: `free_bytes`, `write_bytes_per_second`."""
    name = "disk"
    folder = settings.run_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    room = f"{settings.run_dir}: {free / GIB:.1f} GiB free"
    costs, fix = "no checkpoint can be written", "mm1 doctor --run-dir FOLDER for another place"
    if free < RUN_BYTES:
        found = f"{room}, a run needs {RUN_BYTES / GIB:.1f}"
        return [Finding(name=name, state=State.FAILED, found=found, costs=costs, fix=f"make room, or {fix}")]
    try:
        speed = _write_speed(folder)
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        return [Finding(name=name, state=State.FAILED, found=found, costs=costs, fix=fix)]
    facts = {"free_bytes": free, "write_bytes_per_second": speed}
    return [Finding(name=name, state=State.OK, found=f"{room}, writes {speed / 1e6:.0f} MB/s", facts=facts)]


def _write_speed(folder: Path) -> float:
    """Bytes per second of one file that is written and forced to disk."""
    block = os.urandom(1 << 20)  # a file system may compress zeros away
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mm1-doctor-", buffering=0) as file:
        start = time.monotonic()
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.monotonic() - start)


def probe_network(settings: Settings, *, root: Path = Path("/sys/class")) -> list[Finding]:
    """What NCCL and gloo can talk over between machines."""
    links = sorted(
        link.name
        for link in (root / "net").glob("*")
        if not re.match(r"lo$|docker|veth|virbr|cni|podman", link.name) and _read(link / "operstate") != "down"
    )
    ports = sorted(
        f"{port.parts[-3]} port {port.name} ({_read(port / 'rate')})"
        for port in (root / "infiniband").glob("*/ports/*")
        if "ACTIVE" in _read(port / "state")
    )
    found = "; ".join([*ports, *(f"{link}{_speed(root / 'net' / link)}" for link in links)]) or "none that is up"
    facts = {"interfaces": links, "infiniband_ports": len(ports)}
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    names = [name.lstrip("=") for name in wanted.split(",") if name and not wanted.startswith("^")]
    absent = [name for name in names if not any((root / "net").glob(f"{name}*"))]
    if absent:
        found, fix = f"NCCL_SOCKET_IFNAME={wanted}, but {found}", "set it to one of these, or unset it"
        return [Finding(name="network", state=State.FAILED, found=found, costs="NCCL does not start", fix=fix)]
    if not ports:
        costs = "between machines NCCL uses TCP; within one it makes no difference"
        fix = "for several GPU machines: InfiniBand or RoCE, in a container with --device=/dev/infiniband"
        return [Finding(name="network", state=State.LIMITED, found=found, costs=costs, fix=fix, facts=facts)]
    return [Finding(name="network", state=State.OK, found=found, facts=facts)]


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # also how the kernel says that a link has no speed
        return ""


def _speed(link: Path) -> str:
    megabits = _read(link / "speed")
    return f" ({int(megabits) / 1000:g} Gb/s)" if megabits.isdecimal() else ""
