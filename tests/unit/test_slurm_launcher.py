"""examples/slurm/launch.sh: the command lines that it gives to srun, and when it requeues a job.

Slurm's commands are stand-ins here, which note what they are called with; tests/slurm runs the real ones.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_mm1.config.loading import load_config, to_yaml
from megatron_mm1.config.presets import preset
from megatron_mm1.config.recipes import apply_recipe
from megatron_mm1.config.validation import validate
from tests.conftest import REPOSITORY
from tests.unit.test_slurm_scripts import gpus

JOB = "42"
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "%s\\n" node7 node8; else echo "scontrol $*" >>calls; kill $PPID; fi',
    "scancel": 'echo "scancel $*" >>calls',
    "squeue": "${SQUEUE:-echo RUNNING}",
    "srun": """{ printf srun; printf ' <%s>' "$@"; echo; } >>calls; eval "${SRUN:-}" """,
}


@dataclass
class Job:
    """A job on two nodes with 96 cores each, which sources the launcher and runs a command."""

    folder: Path
    settings: str = ""

    def __call__(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "settings").write_text(f"prepare() {{ :; }}\n{self.settings}\n")
        job = dict(SLURM_JOB_ID=JOB, SLURM_JOB_NAME="run", SLURM_NNODES="2", SLURM_CPUS_ON_NODE="96")
        environment = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "MM1_SITE": "settings",
            "SLURM_JOB_NODELIST": "node[7-8]",
        }
        return subprocess.run(
            ["bash", "-c", f"export SCRIPT=$$; source examples/slurm/launch.sh; {command}"],
            cwd=self.folder,
            env=environment | job | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def started(self) -> list[list[str]]:
        """The words of each call of srun."""
        return [re.findall("<(.*?)>", call) for call in self.calls() if call.startswith("srun")]

    def is_requeued(self) -> bool:
        return f"scontrol requeue {JOB}" in self.calls()

    def save(self, checkpoint: str) -> None:
        folder = self.folder / "runs/run/checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "latest").write_text(checkpoint)


@pytest.fixture
def job(tmp_path) -> Job:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/usr/bin/env bash\n{text}\n")
        command.chmod(0o755)
    return Job(tmp_path, settings="HEALTH_CHECK=no")


MM1 = ["python", "-m", "megatron_mm1", "train", "--preset", "mm1 tiny"]


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("CONTAINER=none", []),
        (
            "CONTAINER=pyxis CONTAINER_IMAGE=nvcr.io#mm1:1",
            ["--container-image=nvcr.io#mm1:1", "--container-mounts={mounts}", "--container-workdir={here}"],
        ),
        (
            "CONTAINER=apptainer CONTAINER_IMAGE=mm1.sif",
            ["apptainer", "exec", "--nv", "--bind", "{mounts}", "--pwd", "{here}", "mm1.sif"],
        ),
    ],
)
def test_each_gpu_gets_a_task_in_the_container(job, container, expected):
    job.settings += f'\n{container}\nCONTAINER_MOUNTS=("$PWD" /data)'
    here = str(job.folder)
    assert job('on_every_gpu train --preset "mm1 tiny"').returncode == 0
    [words] = job.started()
    expected = [word.format(mounts=f"{here}:{here},/data:/data", here=here) for word in expected]
    step = ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"]
    assert words == [*step, "--kill-on-bad-exit=0", "--wait=60", *expected, *MM1]


def test_torchrun_is_one_task_a_node(job):
    job.settings += "\nLAUNCHER=torchrun"
    job('on_every_gpu train --preset "mm1 tiny"')
    [words] = job.started()
    assert words[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"]
    command = words[words.index("python") :]
    assert command[1:3] == ["-m", "megatron_mm1.torchrun"] and command[-5:] == MM1[1:]
    options = dict(zip(command[3:-5:2], command[4:-5:2], strict=True))
    assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "8"
    assert options["--rdzv-endpoint"] == "node7:20042" and options["--rdzv-id"] == JOB


def test_one_process_sees_its_whole_node(job):
    job("on_first_node convert inspect x")
    assert job.started()[0][:4] == ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=96"]


@pytest.mark.parametrize("setting", ["CONTAINER=docker", "LAUNCHER=mpirun"])
def test_an_unknown_setting_ends_the_job(job, setting):
    job.settings += f"\n{setting}"
    result = job("train")
    assert result.returncode == 2 and f"{setting}: use " in result.stderr and not job.is_requeued()


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(0, False), (1, True), (2, False), (3, True), (75, True), (137, True), (143, True)]
)
def test_what_another_try_may_mend_is_requeued(job, code, is_requeued):
    result = job("train", SRUN=f"exit {code}")
    assert job.is_requeued() == is_requeued
    if not is_requeued:
        assert result.returncode == code


@pytest.mark.parametrize(("code", "trained", "is_requeued"), [(0, True, False), (1, False, False), (3, False, True)])
def test_training_begins_on_fit_nodes_only(job, code, trained, is_requeued):
    job.settings = "HEALTH_OPTIONS=(--least-share 0.5)"
    job("train", SRUN=f'[[ "$*" != *health* ]] || exit {code}')
    assert job.started()[0][-3:] == ["health", "--least-share", "0.5"]
    assert [words[-1] for words in job.started()[1:]] == (["bf16"] if trained else [])
    assert job.is_requeued() == is_requeued


def test_runs_have_folders_of_their_own(job):
    job("train --lr 1", SLURM_ARRAY_TASK_ID="3")
    job("train", RUN_DIR="elsewhere")
    first, second = job.started()
    assert first[first.index("--run_dir") + 1] == "runs/run/3" and first[-2:] == ["--lr", "1"]
    assert second[second.index("--run_dir") + 1] == "elsewhere"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (dict(SLURM_RESTART_COUNT="5"), "restarted 5 times"),
        (dict(SQUEUE="echo COMPLETING"), "the job was cancelled, or Slurm is requeueing it"),
    ],
)
def test_a_job_is_not_requeued_that_must_not_come_back(job, variables, reason):
    job.settings += "\nMAX_RESTARTS=5"
    result = job("train", SRUN="exit 75", **variables)
    assert not job.is_requeued() and result.returncode == 75 and reason in result.stderr


def test_the_site_may_forbid_requeueing(job):
    job.settings += "\nREQUEUE=no"
    assert job("train", SRUN="exit 75").returncode == 75 and not job.is_requeued()


def test_a_controller_that_does_not_answer_is_no_reason_to_stay_away(job):
    job("train", SRUN="exit 75", SQUEUE="false")
    assert job.is_requeued()


def test_starts_without_a_new_checkpoint_are_limited(job):
    job.settings += "\nMAX_STARTS_FROM_ONE_CHECKPOINT=2"
    tries = []
    for checkpoint in ("step-1", "step-2", "step-2", "step-2"):
        job.save(checkpoint)
        (job.folder / "calls").unlink(missing_ok=True)
        result = job("train", SRUN="exit 1")
        tries.append((len(job.started()), job.is_requeued()))
    # Requeued after the first from step-2, not after the second, and a third, which was Slurm's doing, does nothing.
    assert tries == [(1, True), (1, True), (1, False), (0, False)]
    assert result.returncode == 1
    assert "started 2 times from checkpoint step-2 without another one: not started again" in result.stderr


def test_starts_of_another_job_do_not_count(job):
    job.settings += "\nMAX_STARTS_FROM_ONE_CHECKPOINT=1"
    job("train", SRUN="exit 1")
    job("train", SRUN="exit 0", SLURM_JOB_ID="43")
    assert len(job.started()) == 2


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_the_schedulers_signal_is_passed_on_and_the_end_awaited(job, name):
    result = job("train", SRUN=f"kill -{name} $SCRIPT; sleep 0.5; echo ended >>calls; exit 75")
    assert job.calls()[1:] == [f"scancel --signal=TERM {JOB}", "ended", f"scontrol requeue {JOB}"]
    assert "ended by a signal, with a checkpoint" in result.stderr


STAGES = {
    "sft": ("sft", "mm1-3b"),
    "llava15_align": ("llava15-align", "llava15-7b"),
    "llava15_sft": ("llava15-sft", "llava15-7b"),
}


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_starts_from_the_checkpoint_that_is_named(job, monkeypatch, script):
    """With its recipe, in a layout that the GPUs it asks for can have; a site's options and the user's come last."""
    recipe, name = STAGES[script]
    monkeypatch.chdir(job.folder)
    (job.folder / "my start").mkdir()
    (job.folder / "my start/config.yaml").write_text(to_yaml(preset(name)))
    job.settings += "\nTRAIN_OPTIONS=(--training.seed 5)"
    command = f"bash examples/slurm/{script}.sh 'my start' --training.train_iters 700"
    assert job(command).returncode == 0
    [words] = job.started()
    config = load_config(words[words.index("train") + 1 :])
    expected = apply_recipe(recipe, preset(name))
    assert (config.model, config.optimizer, config.data) == (expected.model, expected.optimizer, expected.data)
    assert (config.checkpoint.load, config.training.seed, config.training.train_iters) == ("my start", 5, 700)
    assert config.run_dir == "runs/run"
    validate(config, world_size=gpus(REPOSITORY / f"examples/slurm/{script}.sh"))


@pytest.mark.parametrize("arguments", ["", "nowhere", "--training.seed 5"])
def test_a_stage_without_its_checkpoint_does_not_start(job, arguments):
    result = job(f"bash examples/slurm/llava15_sft.sh {arguments}")
    assert result.returncode == 2 and "sbatch SCRIPT CHECKPOINT" in result.stderr
    assert job.started() == [] and not job.is_requeued()
