"""A real Slurm cluster on this machine: two nodes that run jobs, and 32 with GPUs that only exist for the scheduler.

Everything it has is in one folder: a munge key and socket of its own, the controller's state, and for each node a
slurmd in its own UTS and mount namespace, so that `hostname` says node1 or node2 and these names lead to the machine.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("node1", "node2")
_COMMANDS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
_SECONDS = 60

_CONF = """\
ClusterName=mm1
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
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
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=8 RealMemory=4000 Gres=gpu:8
# As a cluster of H100 machines declares itself; CLOUD nodes need not answer for the scheduler to plan with them.
NodeName=h100-[1-32] CPUs=96 RealMemory=1900000 Gres=gpu:8 State=CLOUD
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=INFINITE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF
PartitionName=h100 Nodes=h100-[1-32] MaxTime=INFINITE PriorityTier=1 PreemptMode=OFF
"""


class Cluster:
    """Started by `start`, gone with all its processes after `stop`; commands run with `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: dict[str, str] = {}
        self._host = socket.gethostname().partition(".")[0]

    def start(self) -> None:
        missing = [package for command, package in _COMMANDS.items() if shutil.which(command) is None]
        if missing:
            subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], check=True)
        self._write_files()
        key, run = self.folder / "munge.key", self.folder / "munge.socket"
        files = [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        self._start("munged", ["munged", "--foreground", f"--socket={run}", f"--key-file={key}", *files])
        wait_until(run.exists, "munge's socket")
        self._start("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self._idle() == set(NODES), "both nodes to be idle")

    def _write_files(self) -> None:
        (self.folder / "controller").mkdir()
        with os.fdopen(os.open(self.folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as key:
            key.write(os.urandom(128))
        for gpu in range(8):  # null devices: the scheduler hands them out, nothing can compute on them
            os.mknod(self.folder / f"nvidia{gpu}", 0o600 | 0o020000, os.makedev(1, 3))
        controller, *nodes = _free_ports(1 + len(NODES))
        # Slurm wants a range for a range of nodes.
        ports = ",".join(map(str, nodes))
        values = dict(folder=self.folder, host=self._host, controller_port=controller, node_ports=f"[{ports}]")
        (self.folder / "slurm.conf").write_text(_CONF.format(**values))
        gpus = f"NodeName=node[1-2] Name=gpu File={self.folder}/nvidia[0-7] AutoDetect=off\n"
        (self.folder / "gres.conf").write_text(gpus + "NodeName=h100-[1-32] Name=gpu Count=8 AutoDetect=off\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "plugstack.conf").touch()
        for node in NODES:
            names = [node, *NODES]  # its own first: the name that an address has is the first one
            lines = [f"127.0.0.1 {name}\n" for name in names]
            (self.folder / f"hosts-{node}").write_text("".join(lines) + Path("/etc/hosts").read_text())

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, for the first time or after `kill_node`."""
        enter = 'mount --bind "$1/hosts-$2" /etc/hosts && hostname "$2" && exec slurmd -D -c -N "$2"'
        unshare = ["unshare", "--mount", "--uts", "--propagation", "private"]
        self._start(node, [*unshare, "bash", "-c", enter, "_", str(self.folder), node])
        daemon = self._daemons[node].pid
        wait_until(lambda: _namespace(daemon) not in (None, _namespace(os.getpid())), f"{node}'s namespace")
        self._namespaces[node] = _namespace(daemon) or ""

    def kill_node(self, node: str) -> None:
        """End everything on a node at once, as where its power fails."""
        for process in self.processes_of(node):
            os.kill(process, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def processes_of(self, node: str) -> list[int]:
        """Its slurmd, and jobs and their tasks: those in the namespace that was made for it."""
        processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [process for process in processes if _namespace(process) == self._namespaces[node]]

    def stop(self) -> list[str]:
        """End jobs and daemons.

        Returns:
            Command lines of processes that were left, and have been killed.
        """
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self._end_jobs()
        for name in reversed(self._daemons):
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)
        left = [process for node in self._namespaces for process in self.processes_of(node)]
        lines = [Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ") for process in left]
        for process in left:
            os.kill(process, signal.SIGKILL)
        return lines

    def _end_jobs(self) -> None:
        if jobs := self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", *jobs)
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)

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

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # an interrupt from the keyboard leaves it to `stop`
            )


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = _SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def _namespace(process: int) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/ns/uts")
    except OSError:  # it has ended, or is none of ours
        return None


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
