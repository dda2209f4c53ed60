"""Fixtures shared by all tests."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import megatron_mm1.parallel  # noqa: F401  # before any test imports megatron-core
from megatron_mm1.parity.workers import Pool
from tests import te_process

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("shared machine", deadline=None)  # the first call may compile, and a busy machine is slow
settings.load_profile("shared machine")

REPOSITORY = Path(__file__).parent.parent


def shell_environment() -> dict[str, str]:
    """For commands of scripts and pages: these tests' own environment, whether or not a shell has entered it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)`: the session's pool of n worker processes, started when first asked for and again after a failure.

    Of pools with more than two workers, which take half a gigabyte each, only the last one asked for lives.
    """
    yield from _pools(None)


@pytest.fixture(scope="session")
def te_release() -> Path:
    """The unpacked wheel from which the stand-in for Transformer Engine reads signatures."""
    try:
        return te_process.release()
    except te_process.NoRelease as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="session")
def te_pool(te_release: Path) -> Iterator[Callable[[int], Pool]]:
    """`pool`, whose workers have the stand-in for Transformer Engine."""
    yield from _pools(te_process.install)


@pytest.fixture(scope="session")
def in_te_process(te_release: Path) -> Iterator[Callable[..., Any]]:
    """`in_te_process(function, ...)` calls it in a process of its own that has the stand-in and has joined no job."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=te_process.install) as executor:
        yield lambda function, *args, **kwargs: executor.submit(function, *args, **kwargs).result()


def _pools(initializer: Callable[[], None] | None) -> Iterator[Callable[[int], Pool]]:
    pools: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in pools or not pools[world_size].alive:
            for large in [size for size in pools if size > 2 and world_size > 2]:
                pools.pop(large).close()
            pools[world_size] = Pool(world_size, initializer=initializer)
        return pools[world_size]

    yield get
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def groups():
    """Process groups of a single process, the test's own."""
    from megatron_mm1.config import ParallelConfig
    from megatron_mm1.parallel.groups import build_process_groups, initialize_process_group

    initialize_process_group(timeout_minutes=1)
    return build_process_groups(ParallelConfig(), seed=1)


@pytest.fixture(scope="session")
def demo_corpus() -> Path:
    """The demo corpus, which `make corpus` builds; paths in the mm1-tiny presets are relative to the repository."""
    corpus = REPOSITORY / ".cache" / "demo-corpus"
    if not (corpus / "corpus.json").is_file():
        pytest.fail(f"no demo corpus at {corpus}: run `make corpus`")
    os.chdir(REPOSITORY)
    return corpus


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB: one checkpoint of `saving_jobs`' tiny model and no second one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
