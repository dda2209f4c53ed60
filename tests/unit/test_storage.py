"""Prepared data read from object storage is what a local folder gives, over a real S3 interface."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from megatron_mm1.data import storage
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.errors import UserError
from tests.corpora import page_documents, small_tokenizer

BUCKET = "s3://training-data"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(page_documents(30), tokenizer=small_tokenizer(folder), output=folder / "pages")
    return folder / "pages"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
        running.stop()


@pytest.fixture
def remote(server: None, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.01)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    if files.exists(BUCKET):
        files.rm(BUCKET, recursive=True)
    files.mkdir(BUCKET)
    files.put(str(local), f"{BUCKET}/pages", recursive=True)
    return f"{BUCKET}/pages"


def test_every_document_is_the_same(local: Path, remote: str) -> None:
    here, there = (IndexedSource(path, tokenizer_fingerprint=None) for path in (local, remote))
    assert there.fingerprint == here.fingerprint
    everything = [(number, 0, int(size)) for number, size in enumerate(here.num_tokens(np.arange(len(here))))]
    for ours, theirs in zip(here.pieces(everything), there.pieces(everything), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.images == theirs.images
    assert there.key(7) == here.key(7)


def test_a_worker_process_opens_its_own(remote: str) -> None:
    source = IndexedSource(remote, tokenizer_fingerprint=None)
    assert pickle.loads(pickle.dumps(source)).piece(3).images == source.piece(3).images


def test_the_index_is_fetched_once(remote: str, tmp_path: Path) -> None:
    IndexedSource(remote, tokenizer_fingerprint=None)
    files = fsspec.filesystem("s3")
    files.rm(f"{remote}/part-00000/images.npy")
    assert len(IndexedSource(remote, tokenizer_fingerprint=None)) == 30
    for copy in (tmp_path / "cache").rglob("*"):
        if copy.is_file():
            copy.unlink()
    with pytest.raises(UserError, match=r"has no part-00000/images\.npy"):
        IndexedSource(remote, tokenizer_fingerprint=None)


def test_an_index_that_was_changed_is_refused(remote: str) -> None:
    files = fsspec.filesystem("s3")
    content = files.cat_file(f"{remote}/part-00000/documents.npy")
    files.pipe_file(f"{remote}/part-00000/documents.npy", content[:-1] + b"\1")
    with pytest.raises(UserError, match=r"documents\.npy is not what its manifest says"):
        IndexedSource(remote, tokenizer_fingerprint=None)


def test_nothing_there_names_the_command(remote: str) -> None:
    with pytest.raises(UserError, match=r"no prepared data in 's3://training-data/nothing'"):
        IndexedSource(f"{BUCKET}/nothing", tokenizer_fingerprint=None)


def test_a_failing_network_is_tried_again_and_then_told(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = IndexedSource(remote, tokenizer_fingerprint=None)
    files = source._storage._files
    calls = []
    fetch = files.cat_ranges

    def failing(times: int):
        def cat_ranges(*arguments: object, **options: object) -> list[bytes]:
            calls.append(1)
            if len(calls) <= times:
                raise ConnectionError("the cable is out")
            return fetch(*arguments, **options)

        return cat_ranges

    monkeypatch.setattr(files, "cat_ranges", failing(2))
    assert len(source.piece(1).tokens)
    assert len(calls) == 3
    calls.clear()
    monkeypatch.setattr(files, "cat_ranges", failing(100))
    with pytest.raises(UserError, match=r"in 4 attempts: ConnectionError: the cable is out"):
        source.piece(1)


def test_an_unknown_protocol_is_told() -> None:
    with pytest.raises(UserError, match="cannot open carrier-pigeon://loft"):
        IndexedSource("carrier-pigeon://loft", tokenizer_fingerprint=None)
