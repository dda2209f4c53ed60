"""Kills a training run while it saves, again and again, and lets the next one go on: a program for test_killed_saves.

A parent that has imported everything forks each run, so that a run starts in a second. A run loads the newest
checkpoint, compares it with the digest of what was saved as that step, reports, and trains and saves until killed.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from megatron_mm1.checkpoint.format import LATEST, find_checkpoint, read_metadata
from megatron_mm1.parallel.groups import initialize_process_group
from megatron_mm1.training.saving import CheckpointSaver
from tests.parallel import saving_jobs as jobs
from tests.parallel.jobs import Run

MODEL = "dense"


def train(folder: Path, report: int) -> None:
    """In a forked child: check the newest checkpoint, then train and save for ever."""
    initialize_process_group(timeout_minutes=1)
    config = jobs.config_of(MODEL)
    run, checkpoints, digests = Run(config), folder / "checkpoints", folder / "digests.jsonl"
    iteration = 0
    if (checkpoints / LATEST).exists():
        checkpoint = find_checkpoint(checkpoints)
        iteration = read_metadata(checkpoint).iteration
        run.load(checkpoint)
        saved = [digest for step, digest in map(json.loads, digests.read_text().splitlines()) if step == iteration]
        if jobs.digest(run) != saved[-1]:
            _tell(report, {"error": f"{checkpoint} is not what was saved"})
            return
    _tell(report, {"loaded": iteration})
    saver = CheckpointSaver(checkpoints, asynchronous=True, keep_last=3)
    with digests.open("a", buffering=1) as file:
        while True:
            jobs.steps(run, 1)
            iteration += 1
            saver.wait()
            file.write(json.dumps([iteration, jobs.digest(run)]) + "\n")
            began = time.monotonic()
            saver.save(jobs.metadata_of(config, iteration), run.state())
            saver.wait()
            _tell(report, {"saved": iteration, "seconds": time.monotonic() - began})


def _tell(report: int, what: dict[str, object]) -> None:
    os.write(report, (json.dumps(what) + "\n").encode())


class Child:
    """A run in a forked process."""

    def __init__(self, folder: Path) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            try:
                train(folder, writing)
            except BaseException as error:
                _tell(writing, {"error": repr(error)})
            os._exit(1)
        os.close(writing)
        self.lines = os.fdopen(reading)

    def next(self) -> dict[str, object]:
        line = self.lines.readline()
        told: dict[str, object] = json.loads(line) if line else {"error": "the run ended without a word"}
        if "error" in told:
            raise SystemExit(str(told["error"]))
        return told

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.lines.close()


def first_byte(checkpoints: Path) -> None:
    """Wait until a file of a checkpoint under way has content."""
    while not any(path.stat().st_size for path in checkpoints.glob(".step-*.partial/*") if path.exists()):
        time.sleep(0.0005)


def latest(checkpoints: Path) -> str:
    return (checkpoints / LATEST).read_text().strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    checkpoints, draw = args.folder / "checkpoints", random.Random(args.seed)

    child = Child(args.folder)
    child.next()
    child.next()
    window = float(str(child.next()["seconds"]))  # of the second save: the first makes the copies' memory
    child.kill()

    kills = within = 0
    while kills < args.kills or within < 2 * args.kills / 3:
        if kills == 4 * args.kills:
            raise SystemExit(f"only {within} of {kills} kills hit a save")
        child = Child(args.folder)
        loaded = child.next()["loaded"]
        if f"step-{loaded:08d}" != latest(checkpoints):
            raise SystemExit(f"{latest(checkpoints)} is the newest, step {loaded} was loaded")
        if kills % 3:
            first_byte(checkpoints)
            before = latest(checkpoints)
            time.sleep(draw.uniform(0, window))
            child.kill()
            within += latest(checkpoints) == before
        else:
            time.sleep(draw.uniform(0, 3 * window))
            child.kill()
        kills += 1
    child = Child(args.folder)
    last = child.next()["loaded"]
    child.kill()
    print(json.dumps({"kills": kills, "between_first_byte_and_latest": within, "last_iteration": last}))


if __name__ == "__main__":
    sys.exit(main())
