"""Training as users do, with AdamW on the corpus, is the same in every layout: one preset, unchanged but for its
parallel sizes, from one checkpoint, in float32. Every gradient in many more layouts is test_parity.py's.
"""

import dataclasses

import pytest

from megatron_mm1.config.presets import preset
from tests.parallel import jobs

TP_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS = {
    "TP2, images shared": ("mm1-tiny", 2, dict(tensor_model_parallel_size=2, vision_parallel_mode="data")),
    "TP2+SP": ("mm1-tiny", 2, TP_SP),
    "CP2, images shared": ("mm1-tiny", 2, dict(context_parallel_size=2, vision_parallel_mode="data")),
    "PP2 VPP2": ("mm1-tiny", 2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "PP2, tied output": ("mm1-tiny-tied", 2, dict(pipeline_model_parallel_size=2)),
    "DP2, distributed optimizer": ("mm1-tiny", 2, dict(use_distributed_optimizer=True)),
    "TP2 PP2": ("mm1-tiny", 4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "EP2, distributed optimizer": (
        "mm1-tiny-moe",
        2,
        dict(expert_model_parallel_size=2, use_distributed_optimizer=True),
    ),
    "PP2 EP2": ("mm1-tiny-moe", 4, dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
    "TP2+SP EP2": ("mm1-tiny-moe", 2, dict(**TP_SP, expert_model_parallel_size=2)),
}
COMPONENTS = ("tower", "connector", "decoder")

pytestmark = pytest.mark.demo


def config_of(name: str, **sizes):
    """The preset with small batches and no warm-up, in one process unless sizes say otherwise.

    "-tied" and "-bf16" after its name tie the output to the embeddings and train in bf16.
    """
    config = preset(name.removesuffix("-tied").removesuffix("-bf16"))
    decoder = config.model.decoder
    if name.endswith("-tied"):
        decoder = dataclasses.replace(decoder, untie_embeddings_and_output_weights=False)
    precision = "bf16" if name.endswith("-bf16") else "fp32"
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, decoder=decoder),
        training=dataclasses.replace(config.training, global_batch_size=8, micro_batch_size=2, precision=precision),
        optimizer=dataclasses.replace(config.optimizer, lr_warmup_iters=1),
    )
    return jobs.with_parallel(config, **sizes)


@pytest.fixture(scope="module")
def reference(pool, demo_corpus, tmp_path_factory):
    """`reference(preset)`: (initial checkpoint, figures on the corpus) of one process."""
    known = {}

    def get(name: str):
        if name not in known:
            config, folder = config_of(name), tmp_path_factory.mktemp(name)
            [checkpoint] = pool(1).run(jobs.save_initial, config, folder)
            [corpus] = pool(1).run(jobs.train_on_corpus, config, checkpoint, steps=5)
            known[name] = checkpoint, corpus
        return known[name]

    return get


def assert_same(figures, expected):
    for step, (ours, theirs) in enumerate(zip(figures, expected, strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), f"loss at step {step}"
        for norm in ("grad_norm", *COMPONENTS):
            assert ours[norm] == pytest.approx(theirs[norm], rel=1e-4, abs=1e-12), f"{norm} at step {step}"
        for component in COMPONENTS:
            assert theirs[component] > 0, f"{component} has no gradient at step {step}"


@pytest.mark.parametrize("name", ["mm1-tiny", "mm1-tiny-moe", "mm1-tiny-tied"])
def test_the_reference_trains(reference, name):
    _, corpus = reference(name)
    losses = [step["loss"] for step in corpus]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_the_corpus_equals_one_process(pool, reference, layout):
    name, world_size, sizes = LAYOUTS[layout]
    checkpoint, corpus = reference(name)
    for figures in pool(world_size).run(jobs.train_on_corpus, config_of(name, **sizes), checkpoint, steps=5):
        assert_same(figures, corpus)
