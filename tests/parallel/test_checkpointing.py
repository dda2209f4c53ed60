"""Checkpoints: resuming is bit-exact, damage is noticed, a checkpoint is there whole or not at all."""

import dataclasses
import json
import pickle
import shutil

import pytest

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata, record_of
from megatron_mm1.config.presets import preset
from megatron_mm1.errors import UserError
from megatron_mm1.training import checkpointing, resume
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of

LAYOUTS = {
    "one process": (1, "mm1-tiny", {}),
    "TP2": (2, "mm1-tiny", dict(tensor_model_parallel_size=2)),
    "TP2, images shared out": (2, "mm1-tiny", dict(tensor_model_parallel_size=2, vision_parallel_mode="data")),
    "PP2": (2, "mm1-tiny", dict(pipeline_model_parallel_size=2)),
    "PP2 VPP2": (
        2,
        "mm1-tiny",
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "CP2, images shared": (2, "mm1-tiny", dict(context_parallel_size=2, vision_parallel_mode="data")),
    "DP2": (2, "mm1-tiny", {}),
    "DP2, distributed optimizer": (2, "mm1-tiny", dict(use_distributed_optimizer=True)),
    "bf16, TP2 + SP": (2, "mm1-tiny-bf16", dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "bf16, distributed optimizer": (2, "mm1-tiny-bf16", dict(use_distributed_optimizer=True)),
    "EP2": (2, "mm1-tiny-moe", dict(expert_model_parallel_size=2)),
    "EP2, distributed optimizer": (
        2,
        "mm1-tiny-moe",
        dict(expert_model_parallel_size=2, use_distributed_optimizer=True),
    ),
}

pytestmark = pytest.mark.demo


@pytest.mark.parametrize(
    "layout",
    # bf16 takes a CPU a minute; journeys of small bf16 models through other layouts are in test_saving.
    [pytest.param(layout, marks=[pytest.mark.slow] if "bf16" in layout else []) for layout in LAYOUTS],
)
def test_resuming_is_bit_exact(pool, demo_corpus, tmp_path, layout):
    world_size, name, sizes = LAYOUTS[layout]
    config = config_of(name, **sizes)
    uninterrupted = pool(world_size).run(jobs.train_save_continue, config, tmp_path)
    assert pool(world_size).run(jobs.resume, config, tmp_path / "step-00000002") == uninterrupted


@pytest.mark.parametrize("sizes", [{}, dict(use_distributed_optimizer=True)], ids=["plain", "distributed optimizer"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resuming_with_another_data_parallel_size(pool, demo_corpus, tmp_path, sizes, before, after):
    config = config_of("mm1-tiny", **sizes)
    uninterrupted = pool(before).run(jobs.train_save_continue, config, tmp_path)
    for losses in pool(after).run(jobs.resume, config, tmp_path / "step-00000002"):
        assert losses == pytest.approx(uninterrupted[0], rel=1e-5)


def test_evaluation_does_not_move_training(pool, demo_corpus):
    [(without, between)] = pool(1).run(jobs.evaluate_between_steps, config_of("mm1-tiny"))
    assert between == without


@pytest.fixture(scope="module")
def saved(pool, demo_corpus, tmp_path_factory):
    [path] = pool(1).run(jobs.save_initial, config_of("mm1-tiny"), tmp_path_factory.mktemp("saved"))
    return path


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy to be damaged by the test."""
    return shutil.copytree(saved, tmp_path / saved.name)


def largest_file(checkpoint):
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_byte(checkpoint):
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(checkpoint):
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lambda checkpoint: largest_file(checkpoint).unlink()])
def test_a_damaged_checkpoint_is_refused_by_name(damaged, groups, damage):
    from megatron_mm1.training.build import build_module

    damage(damaged)
    model = build_module(config_of("mm1-tiny"), backend="local", pg_collection=groups)
    with pytest.raises(UserError, match=f"cannot load checkpoint .*{damaged.name}"):
        checkpointing.load_weights(damaged, [model], pg_collection=groups)


class Attack:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_a_checkpoint_is_not_run(damaged, groups, tmp_path):
    """Though the manifest vouches for it, as that of somebody else's checkpoint may."""
    from megatron_mm1.training.build import build_module

    (damaged / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    manifest = json.loads((damaged / "manifest.json").read_text())
    record = record_of(damaged / ".metadata")
    manifest["files"][".metadata"] = {"bytes": record.size, "sha256": record.sha256}
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    model = build_module(config_of("mm1-tiny"), backend="local", pg_collection=groups)
    with pytest.raises(UserError, match="refusing to read"):
        checkpointing.load_weights(damaged, [model], pg_collection=groups)
    assert not (tmp_path / "ran").exists()


def test_damaged_metadata_is_refused_by_name(damaged):
    (damaged / "mm1.json").write_text("{")
    with pytest.raises(UserError, match="corrupt checkpoint"):
        read_metadata(damaged)


def test_a_newer_format_is_refused(damaged):
    fields = json.loads((damaged / "mm1.json").read_text())
    (damaged / "mm1.json").write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(UserError, match="format 99, newer than this program's 2"):
        read_metadata(damaged)


def test_the_newest_complete_checkpoint_is_found(saved):
    assert find_checkpoint(saved) == saved
    assert find_checkpoint(saved.parent) == saved
    assert not list(saved.parent.glob("*.partial"))


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        find_checkpoint(tmp_path)


def test_latest_naming_a_missing_checkpoint_is_an_error(tmp_path):
    (tmp_path / "latest").write_text("step-00000007\n")
    with pytest.raises(UserError, match="step-00000007, which is missing or incomplete"):
        find_checkpoint(tmp_path)


def test_what_does_not_fit_a_checkpoint_is_listed_at_once(saved):
    metadata = read_metadata(saved)
    config = config_of("mm1-tiny", tensor_model_parallel_size=2)
    training = dataclasses.replace(config.training, global_batch_size=16, freeze=("tower",))
    config = dataclasses.replace(config, training=training)
    with pytest.raises(UserError) as error:
        resume.check_resumable(metadata, config, tokenizer_fingerprint="other")
    assert str(error.value).count("\n  - ") == 3
    for fragment in (
        "wrong tokenizer",
        "global_batch_size was 8 and is 16",
        "training.freeze was () and is ('tower',)",
    ):
        assert fragment in str(error.value)


def test_a_run_may_go_on_in_another_layout(saved):
    metadata = read_metadata(saved)
    config = config_of("mm1-tiny", tensor_model_parallel_size=2)
    resume.check_resumable(metadata, config, tokenizer_fingerprint=metadata.tokenizer_fingerprint)


def test_weights_may_be_trained_on_with_other_preprocessing(saved):
    metadata = read_metadata(saved)
    config = config_of("mm1-tiny")
    vision = dataclasses.replace(config.model.vision, image_resize="pad")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    fingerprint = metadata.tokenizer_fingerprint
    resume.check_resumable(metadata, config, tokenizer_fingerprint=fingerprint, weights_only=True)
    with pytest.raises(UserError, match="image_resize was squash and is pad"):
        resume.check_resumable(metadata, config, tokenizer_fingerprint=fingerprint)


def test_another_model_is_refused(saved):
    metadata = read_metadata(saved)
    with pytest.raises(UserError, match=r"model\.\* differs \(model\.moe was None and is \{"):
        resume.check_resumable(metadata, preset("mm1-tiny-moe"), tokenizer_fingerprint=metadata.tokenizer_fingerprint)
