"""Runs that train adapters: from a base without any, on to where they were left, and merged."""

from dataclasses import replace

import pytest
import torch

from megatron_mm1.checkpoint.commands import convert
from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.config import LoraConfig
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.inference.loading import AS_TRAINED, inference_config
from megatron_mm1.model.lora import LoraLinear, is_adapter
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.parity.jobs import itself
from megatron_mm1.parity.shards import relative_errors, shards, squared_errors, whole_tensors
from megatron_mm1.training.build import build_module
from megatron_mm1.training.checkpointing import load_weights
from megatron_mm1.training.resume import starting_point
from tests.parallel import jobs
from tests.parallel.tiny import tiny_config

pytestmark = pytest.mark.demo
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.25, tower_targets=("linear_qkv", "linear_fc2"))
LAYOUTS = {
    "TP2": dict(tensor_model_parallel_size=2),
    "TP2+SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "TP2, images shared out": dict(tensor_model_parallel_size=2, vision_parallel_mode="data"),
    "PP2": dict(pipeline_model_parallel_size=2),
}


def adapted_config(run_dir, base, *, steps, lora=LORA, **sizes):
    config = tiny_config(run_dir, steps=steps, **sizes)
    checkpoint = replace(config.checkpoint, load=str(base), finetune=True)
    return replace(config, model=replace(config.model, lora=lora), checkpoint=checkpoint)


@pytest.fixture(scope="module")
def base(pool, demo_corpus, tmp_path_factory):
    """A run of two pipeline stages, without adapters."""
    run_dir = tmp_path_factory.mktemp("base")
    pool(2).run(jobs.train_as_users_do, tiny_config(run_dir, steps=2, pipeline_model_parallel_size=2))
    return run_dir


@pytest.fixture(scope="module")
def adapted(pool, base, tmp_path_factory):
    """Four steps from there in one process."""
    run_dir = tmp_path_factory.mktemp("adapted")
    pool(1).run(jobs.train_as_users_do, adapted_config(run_dir, base, steps=4))
    return run_dir


def tensors(run_dir, *, step=None) -> dict[str, torch.Tensor]:
    checkpoint = MM1Checkpoint(run_dir if step is None else run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_a_run_moves_adapters_and_what_has_none(base, adapted):
    before, after = tensors(base), tensors(adapted)
    weights = [name for name in before if not name.startswith(("optimizer", "connector"))]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    adapters = [name for name in after if is_adapter(name) and not name.startswith("optimizer")]
    assert len(adapters) == 2 * (2 * 4 + 1 * 2) and all(after[name].any() for name in adapters)
    kept = {name.split(".", 3)[3] for name in after if name.startswith("optimizer.state.exp_avg.")}
    assert kept == {*adapters, *(name for name in after if name.startswith("connector."))}


def test_a_resumed_run_is_the_same_to_the_bit(pool, base, adapted, tmp_path):
    for steps in (2, 4):
        pool(1).run(jobs.train_as_users_do, adapted_config(tmp_path, base, steps=steps))
    resumed, through = tensors(tmp_path, step=4), tensors(adapted, step=4)
    assert set(resumed) == set(through)
    assert all(torch.equal(resumed[name], through[name]) for name in through)


def start(config, checkpoint, reference=None):
    """On each rank: trained weights of a run that starts, whole ones from one process or compared with those."""
    run = jobs.Run(config)
    run.load_weights(checkpoint)
    mine = shards(run.model, itself, pg_collection=run.groups)
    result = whole_tensors(mine) if reference is None else squared_errors(mine, reference)
    run.close()
    return result


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "TP2+SP" else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_adapters_begin_alike_in_every_layout(pool, base, tmp_path, layout):
    checkpoint = find_checkpoint(base)
    [expected] = pool(1).run(start, adapted_config(tmp_path, base, steps=2), checkpoint)
    for name, tensor in expected.items():
        assert not name.endswith("lora_B") or not tensor.any()
    drawn = [tensor.flatten()[:8].tolist() for name, tensor in expected.items() if name.endswith("lora_A")]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn)  # each its own
    config = adapted_config(tmp_path, base, steps=2, **LAYOUTS[layout])
    errors = relative_errors(
        pool(2).run(start, config, checkpoint, expected), expected, scales=dict.fromkeys(expected, 1)
    )
    assert set(errors.values()) == {0.0}


def replicas_after_steps(config, checkpoint):
    """Adapters' parameters of this rank that every tensor-parallel rank has whole."""
    run = jobs.Run(config)
    run.load_weights(checkpoint)
    batches = run.corpus_batches()
    for _ in range(3):
        run.step(next(batches))
    modules = [(name, module) for name, module in run.model[0].named_modules() if isinstance(module, LoraLinear)]
    whole = {
        f"{name}.{kind}": getattr(module, kind).detach().clone()
        for name, module in modules
        for kind in ("lora_A", "lora_B")
        if kind not in module.split
    }
    run.close()
    return whole


@pytest.mark.parametrize("layout", ["TP2", "TP2, images shared out"])
def test_dropout_leaves_replicas_equal(pool, base, tmp_path, layout):
    """Without sequence parallelism nothing sums the gradients of what all ranks have whole: they drop the same."""
    config = adapted_config(tmp_path, base, steps=3, **LAYOUTS[layout])
    one, other = pool(2).run(replicas_after_steps, config, find_checkpoint(base))
    assert one and all(torch.equal(one[name], other[name]) for name in one)


def logits(checkpoint):
    """What inference makes of a checkpoint."""
    config = inference_config(read_metadata(checkpoint).mm1_config(), sizes=AS_TRAINED, world_size=1)
    groups = build_process_groups(config.parallel, seed=9)
    model = build_module(config, backend="local", pg_collection=groups).eval()
    assert load_weights(checkpoint, [model], pg_collection=groups) == ()
    with torch.no_grad():
        result = model(synthetic_batches(config, "mixed")[0], return_logits=True)
    destroy_process_groups()
    return result


def test_merged_the_model_is_the_same(pool, base, adapted, tmp_path):
    assert convert(["merge", "--checkpoint", str(adapted), "--output", str(tmp_path)]) == 0
    metadata = read_metadata(find_checkpoint(tmp_path))
    assert metadata.mm1_config().model == read_metadata(find_checkpoint(base)).mm1_config().model
    assert set(tensors(tmp_path)) == {name for name in tensors(base) if not name.startswith("optimizer")}
    [[unmerged], [merged], [before]] = (pool(1).run(logits, find_checkpoint(run)) for run in (adapted, tmp_path, base))
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)
    assert (unmerged - before).abs().max() > 1e-3


def test_what_is_merged_or_would_be_torn_apart_is_refused(base, adapted, tmp_path):
    with pytest.raises(UserError, match="no adapters to merge"):
        convert(["merge", "--checkpoint", str(base), "--output", str(tmp_path)])
    with pytest.raises(UserError, match="merge them first"):
        convert(["take", "--checkpoint", str(adapted), "--component", "decoder", "--output", str(tmp_path)])


def test_other_adapters_than_the_checkpoints_are_refused(base, adapted, tmp_path):
    def starting(load, *, finetune=True, lora=LORA):
        config = adapted_config(tmp_path, load, steps=2, lora=lora)
        checkpoint = replace(config.checkpoint, load=load and str(load), finetune=finetune)
        return starting_point(replace(config, checkpoint=checkpoint), open_tokenizer(config.data.tokenizer))

    assert starting(base) is not None and starting(adapted) is not None
    for lora in (None, replace(LORA, rank=3), replace(LORA, decoder_targets=("linear_qkv",))):
        with pytest.raises(UserError, match="its adapters were trained"):
            starting(adapted, lora=lora)
    with pytest.raises(UserError, match="its checkpoint has no adapters"):
        starting(base, finetune=False)
    with pytest.raises(UserError, match="this run has none to start from"):
        starting(None, finetune=False)
