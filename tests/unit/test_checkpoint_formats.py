"""Folders of weights: what is written is read back, by us and by the libraries whose formats they are."""

import json
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from megatron_mm1.checkpoint import format, safe_pickle
from megatron_mm1.checkpoint.dist_checkpoint import COMMON_STATE, DistCheckpoint
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint, write_mm1
from megatron_mm1.checkpoint.safetensors_folder import SafetensorsFolder, write_safetensors
from megatron_mm1.checkpoint.tensors import Piece, PlannedTensor, TensorInfo
from megatron_mm1.errors import UserError
from tests.weights import assert_same, in_pieces, metadata, read_all, saved, tensors_of_every_kind

STATE = tensors_of_every_kind()
EXPERTS = "language_model.decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


class Attack:
    """A pickle of it leaves a file behind where it is loaded without restriction."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# safetensors


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("max_shard_bytes", [1, 1000, 10**9])
def test_safetensors_own_reader_reads_what_we_wrote(tmp_path, rows, max_shard_bytes):
    folder = tmp_path / "model"
    write_safetensors(folder, in_pieces(STATE, rows), config={"a": 1}, max_shard_bytes=max_shard_bytes)
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert_same(found, STATE)
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    assert_same(read_all(SafetensorsFolder(folder)), STATE)


def test_transformers_reads_our_shards(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path / "llama"
    write_safetensors(folder, in_pieces(model.state_dict(), 5), config=model.config.to_dict(), max_shard_bytes=4000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert_same(loaded.state_dict(), model.state_dict())


def test_safetensors_rows(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(folder.read(EXPERTS, slice(1, 3)), STATE[EXPERTS][1:3])


def hf_folder(tmp_path, **files):
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", ["pytorch_model__bin", "consolidated.00__pt", "model__ckpt", "tf__pth"])
def test_pickled_weights_are_refused_unread(tmp_path, name):
    trace = tmp_path / "trace"
    folder = hf_folder(tmp_path, **{name: pickle.dumps(Attack(trace))})
    with pytest.raises(UserError, match=r"as pickles.*convert them to safetensors"):
        SafetensorsFolder(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "", "x.bin"]
)
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    save_file(STATE, tmp_path / "model.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"connector.step": file}}))
    with pytest.raises(UserError, match="outside of its folder"):
        SafetensorsFolder(inside)


def test_everything_wrong_with_a_folder_is_listed_at_once(tmp_path):
    folder = tmp_path / "model"
    write_safetensors(folder, in_pieces(STATE, 100), config={}, max_shard_bytes=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    (folder / files[0]).unlink()
    (folder / files[1]).write_bytes((folder / files[1]).read_bytes()[:-1])
    index["weight_map"]["strange.weight"] = files[2]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        SafetensorsFolder(folder)
    assert f"{files[0]} is missing" in str(error.value)
    assert f"{files[1]} is damaged or cut short" in str(error.value)
    assert f"{files[2]} lacks strange.weight" in str(error.value)


def test_safetensors_have_no_complex_numbers(tmp_path):
    with pytest.raises(UserError, match=r"a \(torch.complex64\), b \(torch.complex128\)"):
        state = {"a": torch.zeros(2, dtype=torch.complex64), "b": torch.zeros(2, dtype=torch.complex128)}
        write_safetensors(tmp_path / "model", in_pieces(state, 1), config={})
    assert list(tmp_path.iterdir()) == []


# MM1 checkpoints


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("max_file_bytes", [1, 10**9])
def test_a_checkpoint_is_read_back(tmp_path, rows, max_file_bytes):
    path = write_mm1(tmp_path, in_pieces(STATE, rows), metadata(), max_file_bytes=max_file_bytes)
    checkpoint = MM1Checkpoint(tmp_path)
    assert (checkpoint.path, checkpoint.metadata) == (path, metadata())
    assert_same(read_all(checkpoint), STATE)
    assert checkpoint.num_chunks(EXPERTS) == (4 if rows == 1 else 2 if rows == 3 else 1)
    for rows_read in (slice(0, 0), slice(0, 1), slice(1, 3), slice(2, 9), slice(-1, None)):
        assert torch.equal(checkpoint.read(EXPERTS, rows_read), STATE[EXPERTS][rows_read])


def test_torch_reads_what_we_wrote(tmp_path):
    path = write_mm1(tmp_path, in_pieces(STATE, 3), metadata())
    found = {name: torch.full_like(tensor, 0) for name, tensor in STATE.items()}
    dcp_load(found, checkpoint_id=path, no_dist=True)
    assert_same(found, STATE)


def test_we_read_what_torch_wrote(tmp_path):
    state = {**STATE, "transposed": STATE[EXPERTS].transpose(0, 2), "a view": torch.randn(9, 4)[2:5]}
    dcp_save(dict(state), storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    checkpoint = DistCheckpoint(tmp_path)
    assert_same(read_all(checkpoint), state)
    assert torch.equal(checkpoint.read("transposed", slice(3, 6)), state["transposed"][3:6])


def test_objects_are_copied_as_they_are(tmp_path):
    objects = {COMMON_STATE: saved([{"steps": torch.tensor(7)}]), "tower.norm._extra_state/shard_0_1": b"anything"}
    write_mm1(tmp_path, in_pieces(STATE, 3), metadata(), objects=objects)
    assert MM1Checkpoint(tmp_path).read_objects(("common_state/", "tower.")) == objects


def test_no_more_than_one_piece_is_in_memory(tmp_path):
    alive = []

    class Counted:
        def __init__(self):
            alive.append(sum(torch.is_tensor(ref()) for ref in references))

    import weakref

    references = []

    def read():
        Counted()
        tensor = torch.randn(4, 1000)
        references.append(weakref.ref(tensor))
        return tensor

    plan = [PlannedTensor(f"t{n}", TensorInfo((12, 1000), torch.float32), (), (Piece(4, read),) * 3) for n in range(2)]
    write_mm1(tmp_path / "mm1", plan, metadata())
    write_safetensors(tmp_path / "hf", plan, config={})
    assert alive == [0] * 12


@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.float32), (4, torch.float16)])
@pytest.mark.parametrize(
    "write", [lambda f, p: write_mm1(f, p, metadata()), lambda f, p: write_safetensors(f, p, config={})]
)
def test_a_piece_that_is_not_as_planned_ends_the_writing(tmp_path, write, rows, dtype):
    info = TensorInfo((4, 2), torch.float32)
    plan = [PlannedTensor("t", info, (), (Piece(4, lambda: torch.ones(rows, 2, dtype=dtype)),))]
    with pytest.raises(RuntimeError, match="planned were"):
        write(tmp_path / "new", plan)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("write", ["write_mm1(folder, plan, metadata())", "write_safetensors(folder, plan, config={})"])
def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path, write):
    script = f"""
import os, torch
import megatron_mm1.checkpoint
from pathlib import Path
from megatron_mm1.checkpoint.mm1_folder import write_mm1
from megatron_mm1.checkpoint.safetensors_folder import write_safetensors
from megatron_mm1.checkpoint.tensors import *
from tests.weights import *
folder = Path({str(tmp_path / "new")!r})
plan = in_pieces(tensors_of_every_kind(), 1000)
plan = [*plan, PlannedTensor("end", TensorInfo((1,), torch.float32), (), (Piece(1, lambda: os._exit(9)),))]
{write}
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    folder = tmp_path / "new"
    with pytest.raises(UserError):
        MM1Checkpoint(folder)
    with pytest.raises(UserError):
        SafetensorsFolder(folder)
    # and the next attempt is not held up by what the first one left
    write_mm1(folder, in_pieces(STATE, 3), metadata())
    assert_same(read_all(MM1Checkpoint(folder)), STATE)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "write",
    [
        lambda f, o: write_mm1(f, in_pieces(STATE, 3), metadata(), overwrite=o),
        lambda f, o: write_safetensors(f, in_pieces(STATE, 3), config={}, overwrite=o),
    ],
)
def test_nothing_is_overwritten_unasked(tmp_path, write):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write(tmp_path, False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    write(tmp_path, True)
    assert len(list(tmp_path.iterdir())) > 1


@pytest.mark.parametrize(
    "write", [lambda f, p: write_mm1(f, p, metadata()), lambda f, p: write_safetensors(f, p, config={})]
)
def test_what_the_disk_refuses_is_named_and_removed(tmp_path, write):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write {tmp_path}.*: File too large"):
            write(tmp_path / "new", in_pieces(STATE, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_mm1(tmp_path / "file" / "below", in_pieces(STATE, 3), metadata())


# Damage and attacks


@pytest.fixture
def checkpoint(tmp_path):
    return write_mm1(tmp_path, in_pieces(STATE, 3), metadata())


def without_manifest(checkpoint):
    """The same folder as another program's: nothing vouches for its bytes."""
    (checkpoint / format.MANIFEST).unlink()
    return checkpoint


def test_an_altered_file_is_noticed_before_what_was_read_counts(checkpoint):
    path = checkpoint / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source = MM1Checkpoint(checkpoint)
    source.verify()
    source.read(EXPERTS)
    with pytest.raises(UserError, match=r"__0_0.distcp is not what was written"):
        source.verify()


def test_a_file_that_nothing_vouches_for_is_not_read(checkpoint):
    manifest = json.loads((checkpoint / format.MANIFEST).read_text())
    del manifest["files"]["__0_0.distcp"]
    (checkpoint / format.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest does not know __0_0.distcp"):
        MM1Checkpoint(checkpoint).read(EXPERTS)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".."])
def test_a_manifest_cannot_leave_its_folder(checkpoint, name):
    (checkpoint / format.MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(UserError, match="out of the folder"):
        MM1Checkpoint(checkpoint)


def test_a_pickle_in_metadata_runs_nothing(checkpoint, tmp_path):
    trace = tmp_path / "trace"
    without_manifest(checkpoint)
    metadata = Metadata({}, storage_data={}, planner_data=Attack(trace), storage_meta=StorageMeta())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"a pickle that wants _?io\.open"):
        DistCheckpoint(checkpoint)
    assert not trace.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert trace.exists(), "the attack would have worked"


@pytest.mark.parametrize("file", ["../x.distcp", "/etc/passwd", "..", ""])
def test_metadata_cannot_leave_the_folder(checkpoint, file):
    metadata = safe_pickle.read_dcp_metadata(without_manifest(checkpoint))
    metadata.storage_data[MetadataIndex("connector.step", [])].relative_path = file
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="names files outside"):
        DistCheckpoint(checkpoint)


def replace_archive(checkpoint, index, content):
    """Put other bytes in the place of a tensor or an object."""
    metadata = safe_pickle.read_dcp_metadata(without_manifest(checkpoint))
    (checkpoint / "other.distcp").write_bytes(content)
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "other.distcp", 0, len(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return DistCheckpoint(checkpoint)


def test_a_pickle_in_place_of_a_tensor_runs_nothing(checkpoint, tmp_path):
    trace = tmp_path / "trace"
    source = replace_archive(checkpoint, MetadataIndex("connector.step", []), saved(Attack(trace)))
    with pytest.raises(UserError, match="damaged"):
        source.read("connector.step")
    assert not trace.exists()


def test_a_pickle_in_place_of_an_object_is_found_before_megatron_loads_it(checkpoint, tmp_path):
    trace = tmp_path / "trace"
    assert safe_pickle.check_checkpoint(checkpoint)
    replace_archive(checkpoint, MetadataIndex(COMMON_STATE), saved([{"a": Attack(trace)}]))
    with pytest.raises(UserError, match=r"refusing.*common_state/shard_0_1 \(Unsupported global: GLOBAL _?io.open"):
        safe_pickle.check_checkpoint(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        saved(torch.randn(5)),
        saved(STATE["connector.step"].double()),
        saved({"connector.step": STATE["connector.step"]}),
        saved(STATE["connector.step"])[:-200],
        b"",
    ],
    ids=["shape", "type", "no tensor", "cut short", "empty"],
)
def test_a_part_that_is_not_what_the_table_says_is_damage(checkpoint, content):
    source = replace_archive(checkpoint, MetadataIndex("connector.step", []), content)
    with pytest.raises(UserError, match=r"other\.distcp is damaged"):
        source.read("connector.step")


def test_missing_parts_are_noticed(checkpoint):
    metadata = safe_pickle.read_dcp_metadata(without_manifest(checkpoint))
    del metadata.state_dict_metadata[EXPERTS].chunks[0]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=f"parts of {EXPERTS} are missing"):
        DistCheckpoint(checkpoint).read(EXPERTS)
