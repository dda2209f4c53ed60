"""A job that meets everything that happens on a cluster computes, bit by bit, what one does that nothing disturbs."""

from collections.abc import Iterator

import pytest
import torch

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, Run, Submitter
from tests.slurm.machine import command_line

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("groups")]


@pytest.fixture
def nodes_return(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.restart_nodes()


def preempt(submit: Submitter, job: str) -> None:
    """By a job of a partition that outranks its own, for which one node is free."""
    stronger = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    submit.wait(submit.cluster.run("sbatch", "--parsable", *stronger))
    assert submit.output(job).count("interrupted by a signal") == 1


def kill_a_rank(submit: Submitter, job: str) -> None:
    _, node = submit.nodes(job)
    [rank] = [process for process in submit.cluster.nodes[node].processes() if _is_rank(command_line(process))]
    rank.kill()


def _is_rank(command: list[str]) -> bool:
    """Neither its launcher nor one of its data workers."""
    return {"megatron_mm1", "train"} <= set(command) and not {"bash", "megatron_mm1.torchrun"} & set(command)


def lose_a_node(submit: Submitter, job: str) -> None:
    _, node = submit.nodes(job)
    submit.cluster.nodes[node].stop()


@pytest.mark.parametrize(
    ("launcher", "misfortunes"),
    [("srun", [preempt, kill_a_rank, lose_a_node]), ("torchrun", [preempt, kill_a_rank])],
)
def test_a_job_goes_on_through(submitter, undisturbed, nodes_return, launcher, misfortunes):
    submitter.settings(f"LAUNCHER={launcher}\n")
    run, job = submitter.run("mm1-7b"), submitter("pretrain_mm1_7b.sh", "--nodes=2")
    for number, misfortune in enumerate(misfortunes, start=1):
        submitter.wait_for_steps(run, 5, start=number)  # with a new checkpoint among them
        misfortune(submitter, job)
    submitter.wait(job)
    assert run.starts() == 1 + len(misfortunes)
    check_equal(run, undisturbed)


def check_equal(run: Run, undisturbed: Run) -> None:
    """Steps that were lost with a process or a node have been computed again, to the same losses."""
    expected = dict(undisturbed.losses())
    assert all(loss == expected[iteration] for iteration, loss in run.losses())
    assert set(run.iterations()) == set(range(1, STEPS + 1))
    ours, theirs = run.tensors(), undisturbed.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])] == []
