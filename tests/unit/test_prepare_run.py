"""`mm1 data prepare` as a run: several processes, kills, full disks, and what it writes where."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from webdataset import TarWriter

from megatron_mm1.data.source import IndexedSource
from tests.corpora import encoded, sentence, small_tokenizer

FILES = 6
ROWS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and six shards of captioned images, the last of them cut short."""
    import numpy as np

    folder = tmp_path_factory.mktemp("data")
    small_tokenizer(folder)
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(FILES):
        with TarWriter(str(folder / "in" / f"{number:05d}.tar")) as tar:
            for row in range(ROWS):
                picture = encoded("JPEG", size=(80, 60), seed=100 * number + row)
                tar.write({"__key__": f"{number:05d}{row:04d}", "jpg": picture, "txt": sentence(rng, 6)})
    last = folder / "in" / f"{FILES - 1:05d}.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2 + 100])
    return folder


def command(data: Path, output: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "megatron_mm1", "data", "prepare", "--reader", "webdataset"),
        *("--input", str(data / "in"), "--tokenizer", str(data / "tokenizer.model"), "--output", str(output)),
        *("--part-size", "1", *arguments),
    ]


def run(data: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(data, output, *arguments), capture_output=True, text=True, timeout=300)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(data, output, "--workers", "1")
    assert done.returncode == 0, done.stderr
    return output


def test_every_record_is_written_or_counted(undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    records = manifest["records"]
    assert len(manifest["parts"]) == FILES
    assert records["read"] == records["written"] + sum(records["rejected"].values())
    assert ROWS * (FILES - 1) < records["written"] < ROWS * FILES
    assert records["rejected"]["rest of a truncated or damaged file"] == 1
    quarantined = [
        line for file in undisturbed.glob("part-*/quarantine.jsonl") for line in file.read_text().splitlines()
    ]
    assert len(quarantined) == sum(records["rejected"].values())
    source = IndexedSource(undisturbed, tokenizer_fingerprint=None)
    assert source.key(ROWS + 3).endswith("000010003")
    assert source.piece(ROWS + 3).images[0] == encoded("JPEG", size=(80, 60), seed=103)


def test_the_number_of_processes_changes_nothing(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "out", "--workers", "3")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(undisturbed)


def test_a_second_run_keeps_what_is_there_and_another_input_is_refused(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*")}
    again = run(data, undisturbed)
    assert again.returncode == 0
    assert "records: " in again.stdout
    assert {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*")} == before
    other = run(data, undisturbed, "--option", "captions=txt=1.0", "--image-check", "header")
    assert other.returncode == 2
    assert "prepared from another input, reader, options or tokenizer" in other.stderr


def test_killed_at_any_moment_it_goes_on_to_the_same_result(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for wanted in (1, 3, FILES):
        killed = subprocess.Popen(
            command(data, output, "--workers", "1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while killed.poll() is None and len(list(tmp_path.glob(".out.preparing/part-*"))) < wanted:
            time.sleep(0.01)
        if killed.poll() is None:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    if not output.exists():
        assert list(tmp_path.glob(".out.preparing/part-*"))
    done = run(data, output, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert content(output) == content(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_worker_that_is_killed_is_told(data: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        command(data, tmp_path / "out", "--workers", "1"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    import psutil

    while not list(tmp_path.glob(".out.preparing/part-*")):
        assert running.poll() is None
        time.sleep(0.01)
    for child in psutil.Process(running.pid).children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    _, error = running.communicate(timeout=120)
    assert running.returncode == 2
    assert "ended without a word" in error and "Traceback" not in error
    assert run(data, tmp_path / "out").returncode == 0


def test_workers_end_with_the_run_that_started_them(data: Path, tmp_path: Path) -> None:
    import psutil

    running = subprocess.Popen(
        command(data, tmp_path / "out", "--workers", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob(".out.preparing/part-*")):
        assert running.poll() is None
        time.sleep(0.01)
    children = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive


def test_two_at_once_are_refused(data: Path, tmp_path: Path) -> None:
    import fcntl

    work = tmp_path / ".out.preparing"
    work.mkdir()
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = run(data, tmp_path / "out")
    os.close(held)
    assert done.returncode == 2
    assert "another process is preparing in" in done.stderr


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail in the same place, with the same kind of error."""
    limited = ["bash", "-c", 'ulimit -f 20; trap "" XFSZ; exec "$@"', "limited"]
    output = tmp_path / "out"
    failed = subprocess.run([*limited, *command(data, output, "--workers", "1")], capture_output=True, text=True)
    assert failed.returncode == 2, failed.stderr
    assert "free some space and run the same command again" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.preparing"]
    assert run(data, output).returncode == 0
    assert content(output) == content(undisturbed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--option", "captions"), "is not NAME=VALUE"),
        (("--option", "colour=red"), "colour"),
        (("--max-bad-fraction", "0"), "records are bad"),
        (("--max-repeats", "3"), "has none"),
    ],
)
def test_bad_arguments_are_one_sentence(data: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(data, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
