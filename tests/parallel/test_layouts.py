"""Every parallel layout computes the same training: one preset, unchanged but for its parallel sizes, from one
checkpoint, in float32.
"""

import dataclasses

import pytest

from megatron_mm1.config.presets import preset
from megatron_mm1.parity.batches import KINDS
from tests.parallel import jobs

DENSE_LAYOUTS = {
    "TP2": dict(tensor_model_parallel_size=2),
    "TP2 + SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": dict(pipeline_model_parallel_size=2),
    "DP2, distributed optimizer": dict(use_distributed_optimizer=True),
    "DP2, overlapped reduction": dict(overlap_grad_reduce=True),
    "TP2 x PP2": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "TP2, images shared out": dict(tensor_model_parallel_size=2, vision_parallel_mode="data"),
    "TP2 + SP, images shared out": dict(
        tensor_model_parallel_size=2, sequence_parallel=True, vision_parallel_mode="data"
    ),
}
MOE_LAYOUTS = {
    "EP2": dict(expert_model_parallel_size=2),
    "EP2, distributed optimizer": dict(expert_model_parallel_size=2, use_distributed_optimizer=True),
    "PP2 x EP2": dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    "TP2 + SP, EP2": dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
}
WORLD_SIZES = {"TP2 x PP2": 4, "PP2 x EP2": 4}
LAYOUTS = [("mm1-tiny", name, sizes) for name, sizes in DENSE_LAYOUTS.items()]
LAYOUTS += [("mm1-tiny-moe", name, sizes) for name, sizes in MOE_LAYOUTS.items()]
LAYOUTS += [("mm1-tiny-tied", "PP2, tied output", dict(pipeline_model_parallel_size=2))]
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
    """`reference(preset)`: (initial checkpoint, figures on the corpus, figures by kind of batch) of one process."""
    known = {}

    def get(name: str):
        if name not in known:
            config, folder = config_of(name), tmp_path_factory.mktemp(name)
            [checkpoint] = pool(1).run(jobs.save_initial, config, folder)
            [corpus] = pool(1).run(jobs.train_on_corpus, config, checkpoint, steps=5)
            [kinds] = pool(1).run(jobs.train_on_kinds, config, checkpoint, kinds=KINDS)
            known[name] = checkpoint, corpus, kinds
        return known[name]

    return get


def assert_same(figures, expected, *, components=COMPONENTS):
    for step, (ours, theirs) in enumerate(zip(figures, expected, strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), f"loss at step {step}"
        for norm in ("grad_norm", *COMPONENTS):
            assert ours[norm] == pytest.approx(theirs[norm], rel=1e-4, abs=1e-12), f"{norm} at step {step}"
        for component in components:
            assert theirs[component] > 0, f"{component} has no gradient at step {step}"


@pytest.mark.parametrize("name", ["mm1-tiny", "mm1-tiny-moe", "mm1-tiny-tied"])
def test_the_reference_trains(reference, name):
    _, corpus, _ = reference(name)
    losses = [step["loss"] for step in corpus]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(("name", "layout", "sizes"), LAYOUTS, ids=[layout for _, layout, _ in LAYOUTS])
def test_training_on_the_corpus_equals_one_process(pool, reference, name, layout, sizes):
    checkpoint, corpus, _ = reference(name)
    ranks = pool(WORLD_SIZES.get(layout, 2)).run(jobs.train_on_corpus, config_of(name, **sizes), checkpoint, steps=5)
    for figures in ranks:
        assert_same(figures, corpus)


@pytest.mark.parametrize(("name", "layout", "sizes"), LAYOUTS, ids=[layout for _, layout, _ in LAYOUTS])
def test_every_kind_of_batch_equals_one_process(pool, reference, name, layout, sizes):
    """No image, an image on one rank only, the most images, unequal trained tokens, text only: no hang, and the same
    numbers.
    """
    checkpoint, _, kinds = reference(name)
    ranks = pool(WORLD_SIZES.get(layout, 2)).run(jobs.train_on_kinds, config_of(name, **sizes), checkpoint, kinds=KINDS)
    for figures in ranks:
        for kind in KINDS:
            sees_images = kind not in ("no image", "text only")
            assert_same(figures[kind], kinds[kind], components=COMPONENTS if sees_images else ("decoder",))
            if not sees_images:
                assert figures[kind][0]["tower"] == 0.0
