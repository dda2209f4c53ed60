"""The shipped scripts on two real nodes: started by either launcher, ended in every way a cluster has, and resumed.

What they compute is compared with a run that nothing disturbed: every loss, and the last checkpoint bit by bit.
"""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import NODES, Cluster, wait_until
from tests.slurm.jobs import PATIENCE, Run

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("groups")]

STEPS = 40
SCRIPTS = sorted(path.name for path in Path("examples/slurm").glob("*.sh") if path.name != "launch.sh")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, demo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """MM1-7B's script, whose layout (two GPUs to a model) fits two nodes of one process."""
    from tests.slurm.conftest import submitter

    submit = submitter.__wrapped__(cluster, demo_corpus, tmp_path_factory.mktemp("undisturbed"))
    submit.settings("HEALTH_CHECK=yes HEALTH_OPTIONS=(--least-share 0.05)\n")
    job = submit("pretrain_mm1_7b.sh", "--nodes=2")
    submit.wait(job)
    assert [iteration for iteration, _ in submit.run("mm1-7b").losses()] == list(range(1, STEPS + 1))
    assert "GB/s between nodes" in submit.output(job)
    return submit.run("mm1-7b")


def check_equal(run: Run, undisturbed: Run) -> None:
    """Steps that were lost with a node are computed again, to the same losses."""
    expected = dict(undisturbed.losses())
    assert all(loss == expected[iteration] for iteration, loss in run.losses())
    assert {iteration for iteration, _ in run.losses()} == expected.keys()
    ours, theirs = run.tensors(), undisturbed.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scheduler_takes_every_script_as_it_is(cluster, script):
    assert "to start at" in cluster.run("sbatch", "--test-only", "--partition=h100", f"examples/slurm/{script}")


def test_torchrun_computes_what_srun_does(submitter, undisturbed):
    submitter.settings("LAUNCHER=torchrun\n")
    submitter.wait(submitter("pretrain_mm1_7b.sh", "--nodes=2"))
    check_equal(submitter.run("mm1-7b"), undisturbed)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_preempted_job_saves_and_goes_on_at_the_next_step(submitter, cluster, undisturbed, launcher):
    submitter.settings(f"LAUNCHER={launcher}\n")
    run, job = submitter.run("mm1-7b"), submitter("pretrain_mm1_7b.sh", "--nodes=2")
    submitter.wait_for_step(run, 3)
    stronger = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=1", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    )
    submitter.wait(stronger)
    submitter.wait(job)
    assert [iteration for iteration, _ in run.losses()] == list(range(1, STEPS + 1))
    assert submitter.output(job).count("interrupted by a signal") == 1
    check_equal(run, undisturbed)


def test_a_job_whose_node_fails_goes_on_from_its_checkpoint(submitter, cluster, undisturbed):
    run, job = submitter.run("mm1-7b"), submitter("pretrain_mm1_7b.sh", "--nodes=2")
    wait_until((run.folder / "checkpoints" / "latest").exists, "a checkpoint", seconds=PATIENCE)
    cluster.kill_node(NODES[1])
    submitter.wait(job, "PENDING")
    cluster.start_node(NODES[1])
    submitter.wait(job)
    check_equal(run, undisturbed)


def test_a_job_whose_process_dies_goes_on_from_its_checkpoint(submitter, cluster, undisturbed):
    run, job = submitter.run("mm1-7b"), submitter("pretrain_mm1_7b.sh", "--nodes=2")
    wait_until((run.folder / "checkpoints" / "latest").exists, "a checkpoint", seconds=PATIENCE)
    os.kill(rank_on(cluster, NODES[1]), signal.SIGKILL)
    submitter.wait(job)
    assert "requeued, to go on from checkpoint step-" in submitter.output(job)
    check_equal(run, undisturbed)


def rank_on(cluster: Cluster, node: str) -> int:
    [rank] = [
        process
        for process in cluster.processes_of(node)
        if b"megatron_mm1\0train" in Path(f"/proc/{process}/cmdline").read_bytes()
        and b"python" in os.path.basename(os.readlink(f"/proc/{process}/exe")).encode()
    ]
    return rank


def test_the_time_limit_is_announced_and_the_job_goes_on(submitter, cluster, undisturbed):
    """Slurm looks at limits every 30 s: the signal comes 60 to 90 s after the start."""
    endless = ("--training.train_iters", "4000")
    run = submitter.run("mm1-7b")
    job = submitter("pretrain_mm1_7b.sh", "--nodes=2", "--time=2", "--signal=B:USR1@60", arguments=endless)
    wait_until(lambda: "requeued, to go on" in submitter.output(job), "the signal", seconds=PATIENCE)
    last = run.losses()[-1][0]
    submitter.wait_for_step(run, last + 2)
    cluster.run("scancel", job)
    submitter.wait(job, "CANCELLED")
    losses = run.losses()
    assert [iteration for iteration, _ in losses] == list(range(1, len(losses) + 1))
    expected = dict(undisturbed.losses())
    assert all(loss == expected.get(iteration, loss) for iteration, loss in losses)


def test_each_job_of_an_array_is_a_run_of_its_own(submitter):
    submitter.settings(
        "TRAIN_OPTIONS+=(--parallel.tensor_model_parallel_size 1 --training.train_iters 4\n"
        '  --optimizer.lr "${SLURM_ARRAY_TASK_ID}e-3")\n'
    )
    job = submitter("pretrain_mm1_3b.sh", "--nodes=1", "--array=1-2")
    submitter.wait(job)
    one, two = (submitter.run(f"mm1-3b/{task}").losses() for task in (1, 2))
    assert len(one) == len(two) == 4
    assert one[0] == two[0] and one[-1] != two[-1]  # the same data and weights, another learning rate


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(submitter):
    """As where a file of the program is broken: every rank crashes, every time."""
    crashing = submitter.folder / "bin" / "python"
    crashing.parent.mkdir()
    crashing.write_text("#!/bin/sh\nexit 1\n")
    crashing.chmod(0o755)
    submitter.settings("prepare() { PATH=$PWD/bin:$PATH; }\nMAX_STARTS_FROM_ONE_CHECKPOINT=2\n")
    job = submitter("pretrain_mm1_7b.sh", "--nodes=2")
    submitter.wait(job, "FAILED")
    assert submitter.output(job).count("requeued, to go on from checkpoint none") == 1
    assert "not requeued: started 2 times from checkpoint none" in submitter.output(job)


def test_an_error_of_the_users_is_not_tried_again(submitter):
    job = submitter("pretrain_mm1_7b.sh", "--nodes=2", arguments=("--data.tokenizer", "nowhere"))
    submitter.wait(job, "FAILED")
    assert "not requeued: the error above" in submitter.output(job) and "nowhere" in submitter.output(job)


def test_a_cancelled_job_stays_away(submitter, cluster):
    run, job = submitter.run("mm1-7b"), submitter("pretrain_mm1_7b.sh", "--nodes=2")
    submitter.wait_for_step(run, 2)
    cluster.run("scancel", job)
    submitter.wait(job, "CANCELLED")
    wait_until(lambda: cluster.run("squeue", "--noheader", f"--jobs={job}") == "", "the job to leave", seconds=60)


def test_smoke(submitter):
    submitter.settings("PROCESSES_PER_NODE=2\n")
    small = dict(SMOKE_STEPS="40", SMOKE_PRECISION="fp32", SMOKE_FP8_RECIPE="bf16", SMOKE_LAYOUTS="DP2,PP2")
    job = submitter("smoke_8gpu.sh", "--time=30", **small)
    submitter.wait(job, seconds=2 * PATIENCE)
    assert submitter.output(job).rstrip().endswith("smoke test passed")
