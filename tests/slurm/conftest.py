"""A cluster for the session, and a folder to submit the shipped scripts from."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Submitter

SITE = """\
PROCESSES_PER_NODE=1
HEALTH_CHECK=no
prepare() { :; } # the test's own environment
TRAIN_OPTIONS=(--preset mm1-tiny --training.eval_interval 0 --training.train_iters 40 --optimizer.lr_warmup_iters 4
  --optimizer.lr_decay_iters 400 --checkpoint.save_interval 10 --logging.log_interval 1 --logging.tensorboard false
  --data.seq_length 128 --training.micro_batch_size 1 --training.global_batch_size 2)
"""
"""In place of a site's settings: mm1-tiny, short, logged at every step. Everything else is as shipped."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="mm1-slurm-") as folder:
        Path(folder).chmod(0o755)  # munge wants its socket where everybody may come; pytest's folders are closed
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            left = cluster.stop()
    assert left == []
    assert folder not in Path("/proc/self/mounts").read_text()


@pytest.fixture
def submitter(cluster: Cluster, demo_corpus: Path, tmp_path: Path) -> Submitter:
    """Submits from a folder that has of the repository what the scripts read."""
    for name in ("examples", ".cache"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "site.env").write_text(SITE)
    return Submitter(cluster, tmp_path)
