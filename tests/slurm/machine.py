"""A machine of the test cluster: processes in namespaces of their own, which the kernel ends together."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, sleep

import psutil

# Dies with the process that made it, and all its processes with it: the first one of a PID namespace takes them along.
_NEW_MACHINE = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--uts", "--propagation", "private"),
]
# The shell stays the first process: like any machine's, it takes on processes whose parents have ended.
_BOOT = 'mount --bind "$1" /etc/hosts; hostname "$2"; eval "$3" & wait'


class Machine:
    """Up from `start` to `stop`.

    It shares this computer's files and network. Its PID, mount and UTS namespaces are its own: `hostname` gives its
    name, its /etc/hosts is another file, and no process in it can see or signal one outside.
    """

    def __init__(self, name: str, *, daemons: str, hosts: Path, environment: Mapping[str, str], log: Path) -> None:
        """
        Args:
            daemons: a shell command that runs while the machine is up.
            hosts: a file that is its /etc/hosts.
            log: gets what the daemons print.
        """
        self.name = name
        self._daemons, self._hosts, self._environment, self._log = daemons, hosts, environment, log
        self._unshare: subprocess.Popen[bytes] | None = None
        self._first = self._namespace = -1

    @property
    def is_up(self) -> bool:
        return self._unshare is not None

    def start(self) -> None:
        boot = ["bash", "-ec", _BOOT, "_", str(self._hosts), self.name, self._daemons]
        with self._log.open("ab") as log:
            self._unshare = subprocess.Popen(
                [*_NEW_MACHINE, *boot],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard leaves it to `stop`
            )
        of_unshare = psutil.Process(self._unshare.pid)
        wait_until(lambda: bool(of_unshare.children()), f"{self.name}'s first process")
        [first] = of_unshare.children()
        # Open files keep both from being mistaken for later ones with the same numbers.
        self._first = os.pidfd_open(first.pid)
        self._namespace = os.open(f"/proc/{first.pid}/ns/pid", os.O_RDONLY)

    def stop(self) -> None:
        """End everything on it at once, as where its power fails; returns when nothing is left of it."""
        if self._unshare is None:
            return
        signal.pidfd_send_signal(self._first, signal.SIGKILL)
        self._unshare.wait()  # for the first process, which waits for all others
        self._unshare = None
        os.close(self._first)
        os.close(self._namespace)

    def processes(self) -> list[psutil.Process]:
        """Those that run on it, its first one and its daemons among them."""
        ours = os.fstat(self._namespace)
        return [process for process in psutil.process_iter() if _is_in(process.pid, ours)]


def command_line(process: psutil.Process) -> list[str]:
    """Empty if the process has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _is_in(pid: int, namespace: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), namespace)
    except OSError:  # it has ended, or is none of ours
        return False


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        sleep(0.1)
