"""A real Slurm cluster on this computer: three nodes that run jobs, and 32 that only exist for the scheduler.

    python -m tests.slurm.cluster COMMAND..

runs a command, which finds the cluster by $SLURM_CONF, and ends the cluster with it. Everything the cluster writes is
in one temporary folder. For root on Debian; Slurm is installed if it is missing.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.slurm.machine import Machine, command_line, wait_until

NODES = ("node1", "node2", "node3")
"""Two for a job, and one to go on with when another is lost."""
_PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
_SECONDS = 60

_CONF = """\
ClusterName=mm1
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# Clusters on one computer share its ports, and jobs choose theirs by their number.
FirstJobId={controller_port}
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=20
MinJobAge=600
SlurmdTimeout=20
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
PlugStackConfig={folder}/plugstack.conf
GresTypes=gpu
NodeName=node[1-3] NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=8 RealMemory=4000 Gres=gpu:8
# As a cluster of H100 machines declares itself; CLOUD nodes need not answer for the scheduler to plan with them.
NodeName=h100-[1-32] CPUs=96 RealMemory=1900000 Gres=gpu:8 State=CLOUD
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=INFINITE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=node[1-3] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=node[1-3] MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF
PartitionName=h100 Nodes=h100-[1-32] MaxTime=INFINITE PriorityTier=1 PreemptMode=OFF
"""
_GPUS = """\
NodeName=node[1-3] Name=gpu File={folder}/nvidia[0-7] AutoDetect=off
NodeName=h100-[1-32] Name=gpu Count=8 AutoDetect=off
"""
_MUNGED = (
    "munged --foreground --socket={folder}/munge.socket --key-file={folder}/munge.key "
    "--pid-file={folder}/munged.pid --log-file={folder}/munged.log --seed-file={folder}/munged.seed"
)


class Cluster:
    """A running cluster.

    Attributes:
        folder: everything it writes.
        environment: in which commands find it.
        nodes: its machines by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._controller = self._machine("controller", _MUNGED.format(folder=folder) + " & slurmctld -D -c")
        self.nodes = {name: self._machine(name, f"slurmd -D -c -N {name}") for name in NODES}

    def _machine(self, name: str, daemons: str) -> Machine:
        hosts, log = self.folder / f"hosts-{name}", self.folder / f"{name}.out"
        return Machine(name, daemons=daemons, hosts=hosts, environment=self.environment, log=log)

    def start(self) -> None:
        self._write_files()
        self._controller.start()
        wait_until((self.folder / "munge.socket").exists, "munge's socket")
        self.restart_nodes()

    def restart_nodes(self) -> None:
        """Start the nodes that are down, and wait until every node is idle."""
        for node in self.nodes.values():
            if not node.is_up:
                node.start()
        wait_until(lambda: self._idle() == set(NODES), "all nodes to be idle")

    def _write_files(self) -> None:
        (self.folder / "controller").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for gpu in range(8):  # null devices: the scheduler hands them out, nothing can compute on them
            os.mknod(self.folder / f"nvidia{gpu}", 0o600 | 0o020000, os.makedev(1, 3))
        controller, *nodes = _free_ports(1 + len(NODES))
        conf = _CONF.format(folder=self.folder, controller_port=controller, node_ports=",".join(map(str, nodes)))
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(_GPUS.format(folder=self.folder))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "plugstack.conf").touch()
        for name in ("controller", *NODES):
            # Its own first: the name that an address has is the first one.
            lines = [f"127.0.0.1 {each}\n" for each in (name, "controller", *NODES)]
            (self.folder / f"hosts-{name}").write_text("".join(lines) + Path("/etc/hosts").read_text())

    def end_jobs(self) -> None:
        """Cancel all jobs, and wait until nothing of them runs.

        Raises:
            AssertionError: a job has left processes behind.
        """
        if jobs := self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", *jobs)
        wait_until(lambda: not self.run("squeue", "--noheader"), "jobs to end")
        wait_until(lambda: not self._processes_of_jobs(), f"processes to end: {self._processes_of_jobs()}", seconds=10)

    def _processes_of_jobs(self) -> list[str]:
        commands = [command_line(process) for node in self.nodes.values() if node.is_up for process in node.processes()]
        return [" ".join(command) for command in commands if command and command[0] not in ("bash", "slurmd")]

    def power_off(self) -> None:
        """End the cluster with everything that runs on it."""
        for machine in (*self.nodes.values(), self._controller):
            machine.stop()

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """The output of a command, most often one of Slurm's; its error output too where it fails."""
        result = subprocess.run(
            command, cwd=cwd, env=self.environment | variables, capture_output=True, text=True, timeout=_SECONDS
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return (result.stdout + (result.stderr if "--test-only" in command else "")).strip()

    def state(self, job: str) -> str:
        """Of a job, or of all jobs of an array where they are in the same."""
        states = self.run("squeue", "--all", "--states=all", "--noheader", f"--jobs={job}", "--format=%T").split()
        return ",".join(sorted(set(states)))

    def _idle(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--Node", "--states=idle", "--partition=low", "--format=%N").split())


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster for the block; jobs that are left at its end are cancelled."""
    assert os.geteuid() == 0, "the cluster's machines are namespaces, which only root can make"
    install_slurm()
    with TemporaryDirectory(prefix="mm1-slurm-") as folder:
        Path(folder).chmod(0o755)  # munge wants its socket where everybody may come
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
            cluster.end_jobs()
        finally:
            cluster.power_off()


def install_slurm() -> None:
    """Install those of its packages that are missing; the services that they bring stay off."""
    missing = [package for command, package in _PACKAGES.items() if shutil.which(command) is None]
    if not missing:
        return
    policy = Path("/usr/sbin/policy-rc.d")  # Debian's packages ask it whether they may start a service
    is_open = not policy.exists()
    if is_open:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        subprocess.run(install, check=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    finally:
        if is_open:
            policy.unlink()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main(command: list[str]) -> int:
    with running_cluster() as cluster:
        return subprocess.run(command, env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
