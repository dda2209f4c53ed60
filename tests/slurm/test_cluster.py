"""The test cluster itself: it ends whole, and touches nothing of the computer's but its own folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import NODES, Cluster, running_cluster
from tests.slurm.machine import command_line, wait_until

pytestmark = pytest.mark.slurm

STRAY = "(setsid sleep 987654 <&- >&- 2>&- &)"
"""Leaves its session, its parent and its output, and so its job."""


def traces(folder: str) -> list[str]:
    """Processes that have something to do with a cluster's folder, and their mounts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        for part in ("cmdline", "environ", "mountinfo"):
            try:
                text = (process / part).read_bytes()
            except OSError:  # ended, or the kernel's
                continue
            if folder.encode() in text:
                found.append(f"{process}/{part}")
    return found


def system_files() -> dict[str, int]:
    """Files of Slurm's and munge's where an installed one would have them, with the time of their last change."""
    folders = [Path(name) for name in ("/etc", "/run", "/var/lib", "/var/log", "/var/spool", "/dev/shm")]
    paths = [path for folder in folders for word in ("slurm", "munge") for path in folder.rglob(f"*{word}*")]
    return {str(path): path.lstat().st_mtime_ns for path in paths}


def submit_stray(cluster: Cluster) -> None:
    cluster.run("sbatch", f"--nodes={len(NODES)}", "--output=/dev/null", "--wrap", f"srun bash -c '{STRAY}'")
    for node in cluster.nodes.values():
        wait_until(lambda node=node: ["sleep", "987654"] in map(command_line, node.processes()), "the job")


def test_a_cluster_takes_everything_with_it(cluster):
    before = system_files()
    with pytest.raises(AssertionError, match="sleep 987654"), running_cluster() as other:
        folder = str(other.folder)
        submit_stray(other)
        assert traces(folder)
    assert traces(folder) == []
    assert not Path(folder).exists()
    assert system_files() == before
    assert set(cluster.run("srun", f"--nodes={len(NODES)}", "hostname").split()) == set(NODES)  # this one lives on


def test_a_cluster_ends_with_the_process_that_started_it():
    command = [sys.executable, "-m", "tests.slurm.cluster", "bash", "-c", "echo $SLURM_CONF; exec sleep 987654"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        folder = os.path.dirname(owner.stdout.readline())
        [waiting] = [child for child in psutil.Process(owner.pid).children() if child.name() in ("bash", "sleep")]
        os.kill(owner.pid, signal.SIGKILL)
        waiting.kill()
    try:
        wait_until(lambda: traces(folder) == [], "the cluster to end", seconds=20)
    finally:
        subprocess.run(["rm", "-r", folder], check=True)


def test_only_processes_of_a_machine_are_its_own(cluster):
    seen = [{process.pid for process in node.processes()} for node in cluster.nodes.values()]
    assert all(seen) and not seen[0] & seen[1]
    assert not any({1, os.getpid(), os.getppid()} & pids for pids in seen)
