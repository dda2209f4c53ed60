"""The checkpoint folder: a manifest vouches for every file, and what is incomplete is no checkpoint."""

import json

import pytest

from megatron_mm1.checkpoint.format import (
    CheckpointMetadata,
    begin,
    commit,
    find_checkpoint,
    prune,
    read_manifest,
    read_metadata,
    sweep,
    verify_files,
)
from megatron_mm1.config.presets import preset
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.errors import UserError


def metadata(iteration):
    return CheckpointMetadata(
        iteration=iteration,
        consumed_sequences=0,
        config=to_dict(preset("mm1-tiny")),
        tokenizer_fingerprint="t",
        plan_fingerprint="p",
        components=("decoder",),
    )


def save(folder, iteration, content="content"):
    partial = begin(folder, iteration)
    (partial / "tensors").write_text(content)
    return commit(partial, metadata(iteration), {})


def test_what_is_committed_is_found_and_whole(tmp_path):
    checkpoint = save(tmp_path, 7)
    assert find_checkpoint(tmp_path) == checkpoint == tmp_path / "step-00000007"
    assert read_metadata(checkpoint) == metadata(7)
    assert set(read_manifest(checkpoint)) == {"tensors", "mm1.json"}
    verify_files(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("cont"), "tensors has 4 bytes, not 7"),
        (lambda path: path.write_text("CONTENT"), "tensors is not what was written"),
        (lambda path: path.unlink(), "tensors is missing"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    checkpoint = save(tmp_path, 1)
    damage(checkpoint / "tensors")
    with pytest.raises(UserError, match=message):
        verify_files(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..", ""])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    checkpoint = save(tmp_path, 1)
    manifest = {"files": {name: {"bytes": 1, "sha256": "0"}}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="a path out of the folder"):
        verify_files(checkpoint)


def test_latest_cannot_name_a_folder_outside(tmp_path):
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("../elsewhere/step-00000001\n")
    with pytest.raises(UserError, match="missing or incomplete"):
        find_checkpoint(tmp_path / "run")


def test_a_folder_without_its_manifest_is_no_checkpoint(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="missing or incomplete"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json, which is written last, is missing"):
        find_checkpoint(checkpoint)


def test_leftovers_of_a_killed_save_stay_until_they_are_swept_up(tmp_path):
    save(tmp_path, 1)
    (begin(tmp_path, 2) / "half").write_text("written")
    assert find_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 3)
    assert (tmp_path / ".step-00000002.partial" / "half").exists()  # may be another program's save under way
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000003"]


def test_killed_between_putting_a_checkpoint_away_and_its_successor_in_place(tmp_path):
    save(tmp_path, 1, "old")
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced")
    found = find_checkpoint(tmp_path)
    assert (found / "tensors").read_text() == "old"


def test_the_newest_stay(tmp_path):
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration)
    assert prune(tmp_path, 1, keep_every=20) == ["step-00000010", "step-00000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000020", "step-00000040"]


def test_what_a_run_that_went_back_has_left_ahead_of_it_stays_until_it_is_replaced(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    save(tmp_path, 5)
    assert prune(tmp_path, 1) == []
    assert find_checkpoint(tmp_path).name == "step-00000005"
    save(tmp_path, 10)
    assert prune(tmp_path, 1) == ["step-00000005"]
    save(tmp_path, 20)
    assert prune(tmp_path, 1) == ["step-00000010"]
