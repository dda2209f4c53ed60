"""A cluster for the session, and what several tests of it share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running_cluster
from tests.slurm.jobs import STEPS, Run, Submitter


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def submitter(cluster: Cluster, demo_corpus: Path, tmp_path: Path) -> Submitter:
    return Submitter.of(cluster, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, demo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the others are compared with: MM1-7B's script, whose layout fits two nodes of one process."""
    submit = Submitter.of(cluster, tmp_path_factory.mktemp("undisturbed"))
    submit.settings("HEALTH_CHECK=yes HEALTH_OPTIONS=(--least-share 0.05)\n")
    job = submit("pretrain_mm1_7b.sh", "--nodes=2")
    submit.wait(job)
    assert submit.run("mm1-7b").iterations() == list(range(1, STEPS + 1))
    assert "GB/s between nodes" in submit.output(job)
    return submit.run("mm1-7b")


@pytest.fixture(scope="session")
def smoke_test(cluster: Cluster, demo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """smoke_8gpu.sh with two processes, submitted when this is first asked for; call it to wait for what it prints."""
    submit = Submitter.of(cluster, tmp_path_factory.mktemp("smoke"))
    submit.settings("PROCESSES_PER_NODE=2\nTRAIN_OPTIONS=(--data.seq_length 128 --training.eval_interval 0)\n")
    small = dict(
        SMOKE_STEPS="20", SMOKE_PRECISION="fp32", SMOKE_FP8_RECIPE="bf16", SMOKE_LAYOUTS="DP2", SMOKE_FOR="train"
    )
    job = submit("smoke_8gpu.sh", "--time=30", **small)

    def wait() -> str:
        submit.wait(job, seconds=1200)
        return submit.output(job)

    return wait
