"""Images of 1344 px become 5 x 144 tokens on every rank of every layout, and train as they do in one process."""

import dataclasses

import pytest

from megatron_mm1.config import MM1Config
from megatron_mm1.parity.harness import Comparison, parity_config
from tests.parallel import tile_jobs
from tests.parallel.test_parity import SMALL, assert_equal, layouts

OF_672_PX = [
    *("--model.vision.image_size", "672", "--model.vision.patch_size", "28"),
    *("--model.connector.tokens_per_image", "144", "--seq_length", "832", "--max_images_per_sequence", "5"),
    *("--micro_batch_size", "1"),
]
"""Twelve times twelve tokens of 24 x 24 patches."""
CONFIGS = {name: parity_config(["--preset", name, *SMALL, *OF_672_PX]) for name in ("mm1-tiny", "mm1-tiny-moe")}
FAST = (
    "DP2, gradients reduced meanwhile",
    "TP2+SP images shared, tower recomputed",
    "PP2 CP2, selective recomputation",
    "TP2+SP EP2, all-gather",
)
"""All others are slow."""


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory):
    data = tile_jobs.prepare_pictures(tmp_path_factory.mktemp("pictures"))

    def comparison(config: MM1Config) -> Comparison:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        return Comparison(
            config,
            kinds=tuple(tile_jobs.TILINGS),
            steps=1,
            job=tile_jobs.run_layout,
            reference=tile_jobs.run_reference,
        )

    started = {name: comparison(config) for name, config in CONFIGS.items()}
    yield started
    for one in started.values():
        one.__exit__()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name,
            layout,
            id=f"{name}: {layout.name}",
            marks=[] if layout.name in FAST else [pytest.mark.slow],
        )
        for name, layout in layouts("pairs")
    ],
)
def test_tiles_train_in_a_layout_as_in_one_process(comparisons, pool, name, layout):
    """Loss, the gradient of every parameter and its update; `share_of_tiles` looks at each rank's batches."""
    assert_equal(comparisons[name], layout, pool, tuple(tile_jobs.TILINGS))
