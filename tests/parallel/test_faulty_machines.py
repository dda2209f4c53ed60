"""What the trainer makes of a dead loader process, damaged data and a full disk."""

import dataclasses
import math
import shutil

import pytest

from tests.parallel import fault_jobs
from tests.parallel.test_anomalies import STEPS, assert_equal, config_of, losses

pytestmark = pytest.mark.demo


def test_a_dead_loader_process_changes_nothing(pool, demo_corpus, tmp_path):
    for name, workers, faults in (("calm", 0, {}), ("killed", 1, {2: "dead workers"})):
        config = config_of(tmp_path / name)
        data = dataclasses.replace(config.data, num_workers=workers)
        assert pool(2).run(fault_jobs.train, dataclasses.replace(config, data=data), faults) == ["", ""]
    assert_equal(pool, tmp_path / "killed", tmp_path / "calm", bad=())


@pytest.fixture
def damaged(demo_corpus, tmp_path):
    """`damaged(file, content -> content)`: a run's configuration whose captions have a file changed."""

    def make(name, change):
        config = config_of(tmp_path / "run")
        captions = next(source for source in config.data.sources if source.name == "captions")
        copy = tmp_path / "captions"
        shutil.copytree(captions.path, copy)
        file = copy / "part-00000" / name
        file.write_bytes(change(file.read_bytes()))
        source = dataclasses.replace(captions, path=str(copy))
        return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(source,)))

    return make


def test_images_that_are_not_what_was_prepared_leave_their_examples_untrained(pool, damaged, tmp_path):
    """Every second byte block of the shard is noise: what is whole is trained, what is not does no harm."""

    def noise(content):
        block = 1 << 12
        return b"".join(
            bytes(255 - byte for byte in content[at : at + block]) if at // block % 2 else content[at : at + block]
            for at in range(0, len(content), block)
        )

    config = damaged("images.bin", noise)
    assert pool(2).run(fault_jobs.train, config, {}) == ["", ""]
    assert len(losses(tmp_path / "run")) == STEPS
    assert all(map(math.isfinite, losses(tmp_path / "run").values()))


def test_a_shard_that_was_cut_short_is_named_before_the_first_step(pool, damaged, tmp_path):
    config = damaged("tokens.bin", lambda content: content[:-1000])
    for error in pool(2).run(fault_jobs.train, config, {}):
        assert "captions/part-00000/tokens.bin" in error and "prepare the data again" in error
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_run_when_the_last_checkpoint_does_not_fit(pool, demo_corpus, small_disk, tmp_path):
    """The ones before it are let pass, as the run may make good for them; training itself went on."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)
    first, second = pool(2).run(fault_jobs.train, config_of(run), {})
    assert first == second
    assert "no checkpoint was saved" in first and "No space left on device" in first
    assert len(losses(run)) == STEPS
    assert not list(small_disk.iterdir())
