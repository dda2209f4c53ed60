"""Kills ranks of a training run, again and again, and lets it start anew: a program for test_chaos.

A parent that has imported everything forks the ranks, so that a start takes a second. It sees in shared memory which
step each rank is in and whether it is saving; to kill one it stops the rank where it stands, looks there, and kills it.
"""

import argparse
import dataclasses
import importlib
import json
import mmap
import os
import random
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.checkpoint.format import find_checkpoint
from megatron_mm1.config import MM1Config
from megatron_mm1.data.plan import training_data
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.parallel.groups import initialize_process_group
from megatron_mm1.training import saving, trainer
from tests.parallel import saving_jobs
from tests.parallel.tiny import tiny_config

RANKS = 2
SAVE_INTERVAL = 7
PEER_FAILED = 3
PLACES = ("elsewhere", "step", "save")
"""Where a rank can be: in a step (forward, backward, update), or in a save (writing its part, putting it in place)."""
LONGEST_DELAY = {"step": 0.05, "save": 0.005}
"""Seconds after a rank has come there: steps and saves of so small a model take not much longer."""
LONGEST_SECONDS = 100.0


def chaos_config(run_dir: Path, *, steps: int) -> MM1Config:
    """A tiny run with optimizer state sharded over two ranks."""
    config = tiny_config(run_dir, steps=steps, use_distributed_optimizer=True, heartbeat_timeout_seconds=30)
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, save_interval=SAVE_INTERVAL, keep_last=3)
    )


def warm_up(config: MM1Config) -> None:
    """In the parent: load and compile what each child would have to by itself, four times as long as a start takes."""
    importlib.import_module("nvidia.dali.experimental.dynamic")
    training_data(config, tokenizer=open_tokenizer(config.data.tokenizer))


class Whereabouts:
    """Memory that the parent shares with its children: each rank's step, and whether it is in a step and in a save."""

    _RECORD = struct.Struct("iii")  # step, in steps, in saves

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, RANKS * self._RECORD.size)

    def read(self, rank: int) -> tuple[int, str]:
        """(step, place); a save comes before a step, which goes on beside it."""
        step, in_step, in_save = self._RECORD.unpack_from(self._memory, rank * self._RECORD.size)
        return step, PLACES[2 if in_save else 1 if in_step else 0]

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def note(self, rank: int, **values: int) -> None:
        step, in_step, in_save = self._RECORD.unpack_from(self._memory, rank * self._RECORD.size)
        fields = {"step": step, "in_step": in_step, "in_save": in_save} | values
        self._RECORD.pack_into(self._memory, rank * self._RECORD.size, *fields.values())

    @contextmanager
    def within(self, rank: int, place: str) -> Iterator[None]:
        self.note(rank, **{place: 1})
        try:
            yield
        finally:
            self.note(rank, **{place: 0})


def instrument(where: Whereabouts, rank: int) -> None:
    """In a child: let the trainer say where it is."""
    enter = trainer.Pulse.enter

    def noted(pulse: Any, phase: str, *, step: int) -> None:
        where.note(rank, step=step)
        enter(pulse, phase, step=step)

    trainer.Pulse.enter = noted  # type: ignore[method-assign]
    trainer.train_step = _within(where, rank, "in_step", trainer.train_step)
    saving._write = _within(where, rank, "in_save", saving._write)
    saving.commit = _within(where, rank, "in_save", saving.commit)


def _within(where: Whereabouts, rank: int, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        with where.within(rank, place):
            return function(*args, **kwargs)

    return noted


class Job:
    """One attempt at the run: a forked process for each rank."""

    def __init__(self, config: MM1Config, where: Whereabouts, output: Path) -> None:
        where.clear()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.where, self.output = where, output
        self.pids = [self._fork(config, rank, port) for rank in range(RANKS)]

    def _fork(self, config: MM1Config, rank: int, port: int) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
            instrument(self.where, rank)
            trainer.train(config)
            code = 0
        finally:
            os._exit(code)

    def wait(self) -> list[int]:
        """The ranks' exit codes; a killed one's is the signal, negative."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def is_over(self) -> bool:
        return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.pids)

    def kill(self, aim: "Aim", delay: float) -> str | None:
        """Kill a rank `delay` seconds after it has come to where it is to die.

        Returns:
            The place where it died; None: the run ended before.
        """
        deadline = time.monotonic() + LONGEST_SECONDS
        while not aim.is_met(*self.where.read(aim.rank)):
            if self.is_over():
                return None
            if time.monotonic() > deadline:
                raise SystemExit(f"{aim} was not met in {LONGEST_SECONDS:.0f} s:\n{self.output.read_text()[-3000:]}")
            time.sleep(0.0002)
        time.sleep(delay)
        victim = self.pids[aim.rank]
        os.kill(victim, signal.SIGSTOP)
        while not (stopped := os.waitid(os.P_PID, victim, os.WSTOPPED | os.WEXITED | os.WNOWAIT)):
            pass
        if stopped.si_code != os.CLD_STOPPED:
            return None
        _, place = self.where.read(aim.rank)
        os.kill(victim, signal.SIGKILL)
        return place


@dataclass(frozen=True)
class Aim:
    """The rank to kill, from which step on, and in which place."""

    rank: int
    step: int
    place: str

    def is_met(self, step: int, place: str) -> bool:
        return step >= self.step and place == self.place


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else 0


def draw_aim(draw: random.Random, kills: int, *, begun: int, steps: int) -> Aim:
    """In turn in a save and in mid-step; a save may be the next one or the one after it."""
    place = ("save", "step")[kills % 2]
    ahead = SAVE_INTERVAL * draw.randint(1, 2) if place == "save" else draw.randint(1, 2 * SAVE_INTERVAL)
    return Aim(draw.randrange(RANKS), min(begun + ahead, steps), place)


def disturbed_run(config: MM1Config, output: Path, *, kills: int, seed: int) -> Counter[str]:
    """Run to the end with so many kills; how many were where."""
    draw, where, died = random.Random(seed), Whereabouts(), Counter[str]()
    run_dir, steps = Path(config.run_dir), config.training.train_iters
    while died.total() < kills:
        begun = newest(run_dir)
        if begun > steps - 2 * SAVE_INTERVAL:
            raise SystemExit(f"only {died.total()} of {kills} kills in {begun} steps: make the run longer")
        aim = draw_aim(draw, died.total(), begun=begun, steps=steps)
        job = Job(config, where, output)
        place = job.kill(aim, draw.uniform(0, LONGEST_DELAY[aim.place]))
        codes = job.wait()
        if place is None:
            raise SystemExit(f"the run ended before {aim}, with {codes}:\n{output.read_text()[-3000:]}")
        if sorted(codes) != [-signal.SIGKILL, PEER_FAILED]:
            raise SystemExit(f"after {aim} the ranks ended with {codes}:\n{output.read_text()[-3000:]}")
        died[place] += 1
    finish(config, output)
    return died


def finish(config: MM1Config, output: Path) -> None:
    """Let a run come to its end."""
    codes = Job(config, Whereabouts(), output).wait()
    if any(codes):
        raise SystemExit(f"undisturbed ranks ended with {codes}:\n{output.read_text()[-3000:]}")


def losses(run_dir: Path) -> dict[int, float]:
    """Of each step, as it was last taken."""
    records = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return {record["iteration"]: record["lm_loss"] for record in records if record["kind"] == "train"}


def differences(one: Path, other: Path) -> list[str]:
    """Steps with another loss, and tensors of the last checkpoint, optimizer state too, that differ in a bit."""
    initialize_process_group(timeout_minutes=1)
    ours, theirs = losses(one), losses(other)
    found = [f"loss of step {step}" for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step)]
    mine, its = (saving_jobs.whole(find_checkpoint(run_dir)) for run_dir in (one, other))
    found += [name for name in mine.keys() ^ its.keys()]
    return found + [name for name in mine.keys() & its.keys() if not torch.equal(mine[name], its[name])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    calm, disturbed = args.folder / "undisturbed", args.folder / "disturbed"
    warm_up(chaos_config(calm, steps=args.steps))
    died = disturbed_run(
        chaos_config(disturbed, steps=args.steps), args.folder / "disturbed.txt", kills=args.kills, seed=args.seed
    )
    finish(chaos_config(calm, steps=args.steps), args.folder / "undisturbed.txt")
    result = {"steps": len(losses(calm)), "kills": died.total(), **{place: died[place] for place in PLACES}}
    print(json.dumps({**result, "differences": differences(disturbed, calm)}))


if __name__ == "__main__":
    sys.exit(main())
