"""The shipped scripts on two real nodes: what Slurm makes of them, and how their jobs end.

The smoke test takes one node for minutes; the other tests' jobs run beside it.
"""

import time

import pytest

from megatron_mm1.cli import main
from tests.conftest import REPOSITORY
from tests.slurm.jobs import PATIENCE
from tests.slurm.machine import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("smoke_test")]

SCRIPTS = sorted(path.name for path in (REPOSITORY / "examples/slurm").glob("*.sh") if path.name != "launch.sh")
ONE_NODE = "PROCESSES_PER_NODE=2\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scheduler_takes_every_script_as_it_is(cluster, script):
    assert "to start at" in cluster.run("sbatch", "--test-only", "--partition=h100", f"examples/slurm/{script}")


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_an_error_of_the_users_is_not_tried_again(submitter, launcher):
    submitter.settings(f"{ONE_NODE}LAUNCHER={launcher}\n")
    job = submitter("pretrain_mm1_7b.sh", "--nodes=1", arguments=("--data.tokenizer", "nowhere"))
    submitter.wait(job, "FAILED")
    assert "nowhere" in submitter.output(job)
    assert "not requeued: the error above" in submitter.output(job)
    assert submitter.run("mm1-7b").starts() == 1


def test_each_job_of_an_array_is_a_run_of_its_own(submitter):
    submitter.settings(
        "TRAIN_OPTIONS+=(--parallel.tensor_model_parallel_size 1 --training.train_iters 4\n"
        '  --optimizer.lr "${SLURM_ARRAY_TASK_ID}e-3")\n'
    )
    submitter.wait(submitter("pretrain_mm1_3b.sh", "--nodes=1", "--array=1-2"))
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
    job = submitter("pretrain_mm1_7b.sh", "--nodes=1")
    submitter.wait(job, "FAILED")
    assert submitter.output(job).count("requeued, to go on from checkpoint none") == 1
    assert "not requeued: started 2 times from checkpoint none" in submitter.output(job)


def test_the_time_limit_is_announced_and_a_cancelled_job_stays_away(submitter, cluster, undisturbed):
    submitter.settings(ONE_NODE)
    run, endless = submitter.run("mm1-7b"), ("--training.train_iters", "4000")
    job = submitter("pretrain_mm1_7b.sh", "--nodes=1", "--signal=B:USR1@100", arguments=endless)
    submitter.wait_for_steps(run, 2)
    minutes = int(time.time() - (run.folder / "starts").stat().st_mtime) // 60
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")  # Slurm looks every 30 s
    wait_until(lambda: "requeued, to go on" in submitter.output(job), "the signal", seconds=PATIENCE)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    submitter.wait_for_steps(run, 2, start=2)

    cluster.run("scancel", job)
    submitter.wait(job, "CANCELLED")
    wait_until(lambda: cluster.run("squeue", "--noheader", f"--jobs={job}") == "", "the job to leave")
    losses, expected = run.losses(), dict(undisturbed.losses())
    assert run.iterations() == list(range(1, len(losses) + 1))
    assert all(loss == expected.get(iteration, loss) for iteration, loss in losses)


def test_an_exported_checkpoint_holds_the_same_weights(submitter, undisturbed):
    arguments = ("export", "--checkpoint", str(undisturbed.folder), "--family", "transformers", "--output", "exported")
    submitter.wait(submitter("convert_checkpoint.sh", arguments=arguments))
    assert main(["convert", "verify", str(undisturbed.folder), str(submitter.folder / "exported")]) == 0


def test_parity(submitter):
    submitter.settings(ONE_NODE)
    small = ("--preset", "mm1-tiny", "--batches", "mixed", "--steps", "1")
    job = submitter("parity.sh", arguments=small, LAYOUTS="PP2")
    submitter.wait(job)
    assert list(submitter.folder.glob(f"runs/parity/{job}/given/*"))


def test_smoke(smoke_test):
    output = smoke_test()
    for part in ("doctor", "parity", "bf16", "fp8", "export"):
        assert f"{part}: passed" in output
    assert output.count("requeued, to go on from checkpoint step-") == 1
    assert output.rstrip().endswith("smoke test passed")


def test_an_unfit_node_ends_the_job(submitter):
    """Of two nodes one is slower than their median, be it by little."""
    submitter.settings("HEALTH_CHECK=yes HEALTH_OPTIONS=(--least-share 1)\n")
    job = submitter("pretrain_mm1_7b.sh", "--nodes=2")
    submitter.wait(job, "FAILED", seconds=PATIENCE)
    assert "is slow" in submitter.output(job)
    assert "not requeued: leave out the node" in submitter.output(job)
