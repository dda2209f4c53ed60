"""Jobs of the shipped scripts, and what they leave behind."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_mm1.checkpoint.format import find_checkpoint
from tests.conftest import REPOSITORY
from tests.parallel.saving_jobs import whole
from tests.slurm.cluster import Cluster
from tests.slurm.machine import wait_until

PATIENCE = 400
"""Seconds that a busy machine may take for what takes an idle one tens."""

STEPS = 40
SITE = f"""\
PROCESSES_PER_NODE=1
HEALTH_CHECK=no
prepare() {{ :; }} # the test's own environment
TRAIN_OPTIONS=(--preset mm1-tiny --training.eval_interval 0 --training.train_iters {STEPS} --optimizer.lr_warmup_iters 4
  --optimizer.lr_decay_iters 400 --checkpoint.save_interval 4 --logging.log_interval 1 --logging.tensorboard false
  --data.seq_length 128 --training.micro_batch_size 1 --training.global_batch_size 2)
"""
"""In place of a site's settings: mm1-tiny, short, logged at every step. Everything else is as shipped."""


@dataclass(frozen=True)
class Run:
    """What a training has logged and saved."""

    folder: Path

    def losses(self) -> list[tuple[int, float]]:
        """(iteration, loss) in the order that they were computed."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [(record["iteration"], record["lm_loss"]) for record in records if record["kind"] == "train"]

    def iterations(self) -> list[int]:
        return [iteration for iteration, _ in self.losses()]

    def starts(self) -> int:
        """Of its job."""
        starts = self.folder / "starts"
        return len(starts.read_text().splitlines()) if starts.exists() else 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the newest checkpoint: weights, moments, steps. Files hold them in an order that varies."""
        return whole(find_checkpoint(self.folder))


@dataclass(frozen=True)
class Submitter:
    """Submits from a folder that has of the repository what the scripts read."""

    cluster: Cluster
    folder: Path

    @classmethod
    def of(cls, cluster: Cluster, folder: Path) -> "Submitter":
        for name in ("examples", ".cache"):
            (folder / name).symlink_to(REPOSITORY / name)
        (folder / "site.env").write_text(SITE)
        return cls(cluster, folder)

    def __call__(self, script: str, *options: str, arguments: tuple[str, ...] = (), **variables: str) -> str:
        """Submit examples/slurm/`script` with sbatch's `options`; returns the job's number."""
        variables |= {"MM1_SITE": "site.env", "PYTHONPATH": str(REPOSITORY)}
        path = f"examples/slurm/{script}"
        submit = ["sbatch", "--parsable", "--time=20", "--output=job-%A_%a.log", *options, path, *arguments]
        return self.cluster.run(*submit, cwd=self.folder, **variables)

    def settings(self, text: str) -> None:
        """Add lines to the site's settings."""
        with (self.folder / "site.env").open("a") as site:
            site.write(text)

    def run(self, name: str) -> Run:
        return Run(self.folder / "runs" / name)

    def output(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"job-{job}_*.log")))

    def nodes(self, job: str) -> list[str]:
        """That a job runs on; the first one runs its script."""
        return self.cluster.run(
            "scontrol", "show", "hostnames", self.cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%N")
        ).split()

    def wait(self, job: str, state: str = "COMPLETED", *, seconds: float = PATIENCE) -> None:
        """Until a job is in a state; fails with what it has printed if it ends in another one."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

        def is_there() -> bool:
            now = self.cluster.state(job)
            assert now == state or now not in ends, f"{now}:\n{self.output(job)[-6000:]}"
            return now == state

        wait_until(is_there, f"job {job} to be {state}", seconds=seconds)

    def wait_for_steps(self, run: Run, count: int, *, start: int = 1) -> None:
        """Until a job's start with this number has made some steps."""
        wait_until(lambda: run.starts() == start, f"start {start}", seconds=PATIENCE)
        before = len(run.losses())
        wait_until(lambda: len(run.losses()) >= before + count, f"steps of {run.folder}", seconds=PATIENCE)
