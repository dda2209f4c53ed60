"""GPUs, as the driver reports them."""

from typing import Any

from megatron_mm1.doctor.finding import Finding, ProbeError, Settings, State, output_of

QUERY = ("name", "memory.total", "driver_version", "compute_cap")
COSTS = "training runs on the CPU: mm1-tiny and tests, no more"


def probe_gpus(settings: Settings) -> list[Finding]:
    """Facts: `gpus`, one dict each of name, memory_bytes, driver and compute_capability."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        output = output_of(command, timeout_seconds=settings.timeout_seconds)
        gpus = [_parse(line) for line in output.splitlines() if line.strip()]
    except FileNotFoundError:
        fix = "a machine with an NVIDIA GPU and its driver; on Slurm, a job with --gpus-per-node; in Docker, --gpus all"
        return [Finding(name="GPU", state=State.MISSING, found="no nvidia-smi", costs=COSTS, fix=fix)]
    except ProbeError as error:
        fix = "dmesg | grep -i nvrm says why; the driver may have to be loaded again, or the machine restarted"
        return [Finding(name="GPU", state=State.FAILED, found=str(error), costs=COSTS, fix=fix)]
    if not gpus:
        return [Finding(name="GPU", state=State.MISSING, found="none that the driver sees", costs=COSTS)]
    kinds = sorted({(gpu["name"], gpu["memory_bytes"] >> 30, gpu["compute_capability"]) for gpu in gpus})
    found = ", ".join(f"{name} ({memory} GiB, compute capability {capability})" for name, memory, capability in kinds)
    return [
        Finding(
            name="GPU",
            state=State.OK if len(kinds) == 1 else State.LIMITED,
            found=f"{len(gpus)} x {found}, driver {gpus[0]['driver']}",
            costs="" if len(kinds) == 1 else "GPUs of several kinds: every step waits for the slowest",
            facts={"gpus": gpus},
        )
    ]


def _parse(line: str) -> dict[str, Any]:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(QUERY) or not values[1].isdecimal():
        raise ProbeError(f"nvidia-smi said {line!r}")
    return {
        "name": values[0],
        "memory_bytes": int(values[1]) << 20,
        "driver": values[2],
        "compute_capability": values[3],
    }
