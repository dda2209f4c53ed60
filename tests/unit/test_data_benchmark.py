"""The arithmetic of the data benchmarks, and the peers' sequences, at small scale."""

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_rate_counts_filled_positions_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = importlib.import_module("data_loading")
    now = [0.0]
    monkeypatch.setattr(loading.time, "perf_counter", lambda: now[0])

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(100):
            now[0] += 0.5
            yield torch.tensor([[1, 1, 2, 0]])

    assert loading.rate(batches(), warm_up=2.0, seconds=4.0) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="ended before"):
        loading.rate(list(batches())[:3], warm_up=2.0, seconds=4.0)


def test_a_peer_that_did_not_run_keeps_no_goal() -> None:
    loading = importlib.import_module("data_loading")
    goals = {goal.name: goal for goal in loading.goals_of({"ours": 30.0, "webdataset": 10.0})}
    assert goals["vs_webdataset"].value == 3.0
    assert goals["vs_webdataset"].holds
    assert not goals["vs_energon"].holds


def test_greedy_sequences_hold_what_fits() -> None:
    packed = importlib.import_module("data_peers.packed")
    examples = [packed.Example([5] * length, b"") for length in (10,) * 17 + (2000, 2000)]
    sizes = [len(chosen) for chosen in packed.greedy(examples)]
    assert sizes == [16, 2, 1]  # 16 images at most; then 155 + 2145 positions, and 2145 more are too many


def test_a_packed_sequence_trains_text_alone() -> None:
    packed = importlib.import_module("data_peers.packed")
    image = torch.zeros(3, packed.IMAGE_SIZE, packed.IMAGE_SIZE)
    examples = [packed.Example([7, 8, 2], image), packed.Example([9, 2], image)]
    sequence = packed.pack(examples, bos_id=1, image_id=3, pad_id=0)
    first, both = examples[0].length, examples[0].length + examples[1].length
    trained = sequence.labels != packed.IGNORE
    assert sequence.labels[trained].tolist() == [7, 8, 2, 9, 2]
    assert sequence.tokens[1:][trained[:-1]].tolist() == [7, 8, 2, 9, 2]
    assert (sequence.tokens == 3).sum() == 2 * packed.TOKENS_PER_IMAGE
    assert sequence.position_ids[[0, first - 1, first, both - 1]].tolist() == [0, first - 1, 0, both - first - 1]
    assert torch.bincount(sequence.segment_ids).tolist() == [packed.SEQ_LENGTH - both, first, both - first]
    assert sequence.images.shape == (2, 3, packed.IMAGE_SIZE, packed.IMAGE_SIZE)


def test_pictures_of_shards_are_files_of_the_size_said() -> None:
    shards = importlib.import_module("data_peers.shards")
    picture = PIL.Image.effect_noise((300, 200), 50).convert("RGB")
    data = [shards.jpeg(picture, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert data[0] == data[1] != data[2]
    with PIL.Image.open(io.BytesIO(data[0])) as image:
        assert (image.size, image.format) == (shards.SIZE, "JPEG")


def test_parts_are_run_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, goals = importlib.import_module("data"), importlib.import_module("goals")
    for part, value in (("planning", 2.0), ("loading", 1.0)):
        found = [goals.Goal(part, value, "times", ">", 1.5)]
        module = type(sys)(f"data_{part}")
        module.measure = lambda arguments, found=found: ({"repeats": arguments.repeats}, found)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"data_{part}", module)
    assert data.main(["planning", "--repeats", "5"]) == 0
    assert "planning repeats: 5" in capsys.readouterr().out
    assert data.main(["planning", "loading"]) == 1
    with pytest.raises(SystemExit):
        data.main(["packing"])
