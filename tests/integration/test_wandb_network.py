"""Logging to Weights & Biases: the network goes, or nobody has logged in on a terminal. The process ends by itself."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_mm1.config.presets import preset
from megatron_mm1.config.serialization import to_yaml
from tests.conftest import REPOSITORY

RUN = """
import sys, time
from pathlib import Path
from megatron_mm1.config.serialization import from_yaml
from megatron_mm1.training.logging import RunLogger

config, begun, go_on = map(Path, sys.argv[1:])
logger = RunLogger(from_yaml(config.read_text()), iteration=0, enabled=True)
logger.record("train", 1, {"loss": 2.25})
begun.touch()
while not go_on.exists():
    time.sleep(0.05)
logger.record("train", 2, {"loss": 7.125})
logger.close()
"""
"""A run of two steps that waits between them."""

LIMIT = 240
"""Seconds, for a machine with much else to do; wandb by itself would wait for days, or for ever."""


class Account(ThreadingHTTPServer):
    """As much of Weights & Biases as a run needs to begin, until the network is gone.

    Attributes:
        gone: set: nobody answers any more.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.gone = threading.Event()
        self.ended = threading.Event()

    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_port}"
        return {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": 40 * "a"}


class Answers(BaseHTTPRequestHandler):
    server: Account
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.gone.is_set():
            self.server.ended.wait()
            return
        answer = {"data": self._answer(json.loads(asked).get("variables") or {})} if self.path == "/graphql" else {}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    @staticmethod
    def _answer(variables: dict[str, str]) -> dict[str, object]:
        """To whatever is asked: who it is, that there is no such run yet, and the run that was made."""
        project = {"name": "mm1", "entity": {"name": "me"}}
        made = {"id": "1", "name": variables.get("name"), "displayName": "a run", "project": project}
        return {
            "viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
            "model": {"bucket": None},
            "upsertBucket": {"bucket": made, "inserted": True},
        }

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def account() -> Iterator[Account]:
    server = Account()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def command(run: Path) -> list[str]:
    """Which waits for `run/go_on`."""
    config = preset("mm1-tiny")
    logging = replace(config.logging, wandb_project="mm1", tensorboard=False, progress_bar=False)
    file = run / "config.yaml"
    file.write_text(to_yaml(replace(config, logging=logging, run_dir=str(run))))
    return [sys.executable, "-c", RUN, str(file), str(run / "begun"), str(run / "go_on")]


def environment(run: Path, **variables: str) -> dict[str, str]:
    """Nobody has logged in, except by `variables`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    folders = {"WANDB_CONFIG_DIR": str(run), "NETRC": str(run / "netrc")}
    return {**others, "PYTHONPATH": str(REPOSITORY), **folders, **variables}


@pytest.mark.parametrize("how", ["refuses", pytest.param("is silent", marks=pytest.mark.slow)])
def test_the_network_goes(tmp_path: Path, how: str) -> None:
    """What could not be sent is on disk, and said to be there."""
    with account() as server:
        variables = environment(tmp_path, **server.environment(), WANDB_FINISH_TIMEOUT="3")
        process = subprocess.Popen(command(tmp_path), env=variables, stdout=subprocess.PIPE, text=True)
        try:
            wait_for(tmp_path / "begun")
            server.gone.set()
            if how == "refuses":
                server.shutdown()
                server.server_close()
            (tmp_path / "go_on").touch()
            said, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0
    assert said.count("Weights & Biases") == 1 and "Timed out" in said and "wandb sync" in said
    (kept,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert all(figure in kept.read_bytes() for figure in (b"2.25", b"7.125"))


def test_nobody_is_asked_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "go_on").touch()
    ours, terminal = pty.openpty()
    threading.Thread(target=drain, args=(ours,), daemon=True).start()
    said = tmp_path / "said"
    with said.open("w") as file:
        variables = environment(tmp_path, TERM="xterm")
        process = subprocess.Popen(command(tmp_path), env=variables, stdin=terminal, stderr=terminal, stdout=file)
        os.close(terminal)
        try:
            assert process.wait(timeout=LIMIT) == 0
        finally:
            process.kill()
    assert "nobody is logged in" in said.read_text() and "wandb sync" in said.read_text()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def drain(terminal: int) -> None:
    """Read what is shown until everybody has closed it."""
    with open(terminal, "rb", buffering=0) as shown, suppress(OSError):
        while shown.read(4096):
            pass


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.05)
