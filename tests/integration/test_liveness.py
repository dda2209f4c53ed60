"""A rank that dies, fails or stops takes the job down, and the job says which rank and at which step."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_mm1.config.serialization import to_yaml
from megatron_mm1.faults import stacks
from megatron_mm1.faults.watch import watched
from tests.conftest import REPOSITORY
from tests.integration import faulty_rank
from tests.parallel import jobs
from tests.parallel.test_anomalies import assert_equal, config_of

SILENCE = 4.0
MARGIN = 20.0
"""Seconds over the limits for rank 1's turn to print, and for a busy machine."""
LIMITS = {"silence_limit": SILENCE, "standstill_limit": 60.0, "collective_timeout": 60.0}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks_environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    """What a launcher sets, which then does nothing more: as plain srun."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


@dataclass(frozen=True)
class Outcome:
    """What became of a job's ranks.

    Attributes:
        exit_codes: None for a rank that was still there.
        outputs: both of a rank's outputs, without its clock.
        seconds: from the fault until the last of `awaited` was over.
        partings: seconds from a rank's last step until it was watched no more, where it came to that.
    """

    exit_codes: list[int | None]
    outputs: list[str]
    seconds: float
    partings: list[float]

    @property
    def verdicts(self) -> list[str]:
        """Our lines, of all ranks; without where each of them last heard the dead."""
        lines = [line for output in self.outputs for line in output.splitlines() if line.startswith("mm1: ")]
        return [line.partition("; last heard")[0] for line in lines]


def run_job(folder: Path, faults: list[str | None], *, awaited: list[int], **limits: float) -> Outcome:
    """Run a rank for each of `faults`, wait for the ranks that should end, and end the rest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([faulty_rank.__name__])
    port, processes = free_port(), []
    for rank, fault in enumerate(faults):
        environment = ranks_environment(rank, len(faults), port)
        options = {**LIMITS, **limits, "stacks": folder / "stacks"}
        arguments = (folder / str(rank), environment, fault, options)
        processes.append(context.Process(target=faulty_rank.start_rank, args=arguments))
        processes[-1].start()
    try:
        deadline = time.monotonic() + 50
        for rank in awaited:
            processes[rank].join(deadline - time.monotonic())
        ended = time.monotonic()
        exit_codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    outputs = [(folder / str(rank)).read_text() for rank in range(len(faults))]
    clocks = [[float(text) for text in re.findall(r"^clock (.*)\n", output, re.MULTILINE)] for output in outputs]
    return Outcome(
        exit_codes=exit_codes,
        outputs=[re.sub(r"^clock .*\n", "", output, flags=re.MULTILINE) for output in outputs],
        seconds=ended - min(min(clock) for clock in clocks if clock),
        partings=[end - start for start, end in (clock for clock in clocks if len(clock) == 2)],
    )


def job_with(folder: Path, fault: str, rank: int, *, ranks: int = 3, ends: bool = True, **limits: float) -> Outcome:
    """A job in which one rank meets a fault."""
    faults = [fault if number == rank else None for number in range(ranks)]
    awaited = [number for number in range(ranks) if ends or number != rank]
    return run_job(folder, faults, awaited=awaited, **limits)


@pytest.mark.parametrize(
    ("fault", "rank", "exit_codes", "said_by", "line"),
    [
        ("killed", 2, [3, 3, -9], 0, "died at step 4: its connection closed"),
        ("stopped", 2, [3, 3, None], 0, "died at step 4: no heartbeat for 4 s"),
        ("raises", 2, [3, 3, 1], 0, r"failed at step 4 \(phase data\): ValueError: the data says nothing"),
        ("killed", 0, [-9, 3, 3], 1, "died at step 4: its connection closed"),
        ("stopped", 0, [None, 3, 3], 1, "died at step 4: no heartbeat for 4 s"),
        ("raises", 0, [1, 3, 3], 0, r"failed at step 4 \(phase data\): ValueError: the data says nothing"),
        (
            "meets_user_error",
            2,
            [2, 2, 2],
            0,
            r"ended at step 4 \(phase data\) with an error: no space left on this machine",
        ),
    ],
)
def test_the_rank_and_its_step_are_named(tmp_path, fault, rank, exit_codes, said_by, line):
    outcome = job_with(tmp_path, fault, rank, ends=fault != "stopped")
    assert outcome.exit_codes == exit_codes
    assert outcome.seconds < SILENCE + MARGIN
    assert re.search(rf"^mm1: rank {rank} \(host \S+, pid \d+\) {line}", outcome.outputs[said_by], re.MULTILINE)
    assert len(set(outcome.verdicts)) == 1
    assert "gloo" not in "".join(outcome.outputs)


def test_only_the_rank_that_raised_shows_its_traceback(tmp_path):
    outcome = job_with(tmp_path, "raises", 1)
    assert ["Traceback" in output for output in outcome.outputs] == [False, True, False]
    assert re.search(r"nothing\nrank 1 \(host \S+, pid \d+\) failed at step 4 \(phase data\)\n$", outcome.outputs[1])


def test_a_rank_that_hangs_is_named_and_shows_where(tmp_path):
    outcome = job_with(tmp_path, "hangs", 1, standstill_limit=4)
    assert outcome.exit_codes == [3, 3, 3]
    assert outcome.seconds < 4 + MARGIN
    behind, foremost = r"behind: rank 1 \(.*\) at step 4 \(phase data\)", r"foremost: at step 4 \(phase step\)"
    folder = tmp_path / "stacks"
    files = f"the stacks of every rank are in {folder}"
    assert re.fullmatch(rf"mm1: no progress for 4 s: {behind}; {foremost}; {files}\n", outcome.outputs[0])
    assert "in hangs" in outcome.outputs[1]
    assert not outcome.outputs[2]
    for rank, function in enumerate(("all_reduce", "hangs", "all_reduce")):
        written = (folder / f"rank-{rank:05d}.txt").read_text()
        assert re.search(rf" rank {rank} \(.*\) at step 4 \(phase .*\); no progress for 4 s: ", written)
        assert f" in {function}\n" in written


def test_a_rank_that_does_not_come_to_a_collective_of_its_phase_is_named(tmp_path):
    """All ranks have entered the step: who waits in the collective and who does not tells them apart."""
    outcome = job_with(tmp_path, "hangs_in_step", 1, standstill_limit=4)
    assert outcome.exit_codes == [3, 3, 3]
    where = r"at step 4 \(phase step\), most waiting in all_reduce at faulty_rank.py:\d+"
    late = r"elsewhere: rank 1 \(host \S+, pid \d+\) in hangs at faulty_rank.py:\d+"
    assert re.match(rf"mm1: no progress for 4 s: all ranks are {where}; {late}; the stacks", outcome.outputs[0])
    assert "in hangs" in outcome.outputs[1]


def test_a_signal_makes_a_rank_write_its_stacks_and_go_on(tmp_path):
    """Also where a thread keeps Python's lock: here the only one, in a call that never looks up."""
    program = (
        "import re, sys; from pathlib import Path; from megatron_mm1.faults.stacks import stacks_on_signal\n"
        "with stacks_on_signal(Path(sys.argv[1]), 7):\n"
        "    print('ready', flush=True); re.match('(a*)*b', 26 * 'a'); print('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(stacks.SIGNAL)
    assert process.communicate()[0] == "done\n" and process.returncode == 0
    assert "re/__init__.py" in (tmp_path / "rank-00007.txt").read_text()


def test_a_collective_that_gives_up_while_all_live_names_who_was_missing(tmp_path):
    outcome = job_with(tmp_path, "hangs", 1, collective_timeout=4)
    assert outcome.exit_codes == [3, 3, 3]
    [line] = outcome.verdicts
    assert re.match(r"mm1: a collective failed on rank \d \(.*\) at step 4 \(phase step\): .*; behind: rank 1 \(", line)
    assert sum("Traceback" in output for output in outcome.outputs) == 1


def test_rank_0_prints_its_own_user_error_and_the_others_end_without_a_word(tmp_path):
    outcome = job_with(tmp_path, "meets_user_error", 0)
    assert outcome.exit_codes == [2, 2, 2]
    assert outcome.outputs == [""] * 3


@pytest.mark.parametrize(("fault", "exit_code"), [(None, 0), ("meets_user_error", 2)])
def test_an_orderly_end_is_quiet_and_quick(tmp_path, fault, exit_code):
    outcome = run_job(tmp_path, [fault] * 3, awaited=[0, 1, 2])
    assert outcome.exit_codes == [exit_code] * 3
    assert outcome.outputs == [""] * 3
    assert len(outcome.partings) == 3
    assert max(outcome.partings) < 1.5


def test_under_torchrun(tmp_path):
    """Its agent ends the others as soon as it looks, and names the rank but not the step: we come first here."""
    once = ("--nproc-per-node", "2", "--max-restarts", "0", "--monitor-interval", "3", "--master-port", free_port())
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *once, faulty_rank.__file__, "killed", "1"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert re.search(r"^mm1: rank 1 \(.*\) died at step 4: its connection closed", result.stderr, re.MULTILINE)


def start_training(folder: Path, rank: int, port: str, *arguments: str) -> subprocess.Popen[str]:
    """A rank of a job of two, as plain srun would start it."""
    command = ("train", "--preset", "mm1-tiny", "--run_dir", str(folder / "run"), "--training.eval_interval", "0")
    with (folder / str(rank)).open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_mm1", *command, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **ranks_environment(rank, 2, port)},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.mark.demo
def test_a_rank_that_hangs_in_training_is_named_and_all_write_their_stacks(demo_corpus, tmp_path):
    arguments = ("--faults.hang_timeout_seconds", "10", "--data.num_workers", "0", "--logging.log_interval", "1")
    arguments += ("--model.connector.connector", "tests.integration.sleepy.Sleepy")
    port = free_port()
    ranks = [start_training(tmp_path, rank, port, *arguments) for rank in range(2)]
    try:
        assert [process.wait(250) for process in ranks] == [3, 3], (tmp_path / "0").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    late = rf"elsewhere: rank 1 \(host \S+, pid {ranks[1].pid}\) in forward at sleepy.py:\d+"
    line = rf"^mm1: no progress for 10 s: all ranks are at step \d+ \(phase step\), most waiting in .*; {late}"
    assert re.search(line, (tmp_path / "0").read_text(), re.MULTILINE)
    for rank, file in enumerate(sorted((tmp_path / "run" / "stacks").iterdir())):
        assert ('sleepy.py", line' in file.read_text()) == (rank == 1)
        assert 'trainer.py", line' in file.read_text()


def pid_of_rank(rank: int, parent: int) -> int:
    """Of torchrun's children."""
    for child in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"no rank {rank} under {parent}")


@pytest.mark.demo
def test_torchrun_starts_the_ranks_again_and_nothing_is_lost(pool, demo_corpus, tmp_path):
    """A rank is killed between checkpoints: losses and last weights are those of an undisturbed run, bit by bit."""
    calm, killed = (config_of(tmp_path / name) for name in ("calm", "killed"))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(killed))
    once = ("--nproc-per-node", "2", "--max-restarts", "1", "--master-port", free_port())
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *once, "-m", "megatron_mm1", "train", "--config", str(file)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = tmp_path / "killed" / "log.jsonl"
        while not (log.is_file() and '"iteration": 3' in log.read_text()):
            assert launcher.poll() is None
            time.sleep(0.02)
        os.kill(pid_of_rank(1, launcher.pid), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 0, errors[-3000:]
    assert [record["iteration"] for record in map(json.loads, log.read_text().splitlines())].count(3) == 2
    pool(2).run(jobs.train_as_users_do, calm)
    assert_equal(pool, tmp_path / "killed", tmp_path / "calm", bad=())


def test_an_illegal_layout_is_refused_before_the_ranks_meet(tmp_path):
    """All its faults at once, by a rank whose peer never comes."""
    layout = ("--parallel.tensor_model_parallel_size", "3", "--parallel.pipeline_model_parallel_size", "9")
    process = start_training(tmp_path, 0, free_port(), *layout)
    try:
        assert process.wait(240) == 2  # it would wait ten minutes for the other
    finally:
        process.kill()
    output = (tmp_path / "0").read_text()
    assert "num_attention_heads 4 is not divisible by tensor_model_parallel_size 3" in output
    assert "pipeline_model_parallel_size 9 is more than the decoder's 4 blocks" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("world_size", "silence_limit"), [(1, 60), (4, 0)])
def test_nothing_runs_for_a_single_process_or_when_switched_off(world_size, silence_limit):
    before = threading.active_count()
    limits = {"silence_limit": silence_limit, "standstill_limit": 60}
    with watched(torch.distributed.HashStore(), rank=0, world_size=world_size, **limits) as pulse:
        pulse.enter("data", step=1)
        assert threading.active_count() == before
