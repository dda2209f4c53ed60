"""AdaFactor against transformers', on whole parameters and on every layout's parts of them, also across checkpoints.

The gradients are given: random, of very different sizes, the same whole tensors in every layout.
"""

import math
import zlib
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

from megatron_mm1.checkpoint.format import OPTIMIZER_PREFIX, CheckpointMetadata
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.parity.harness import parity_config
from megatron_mm1.parity.jobs import main_grad
from megatron_mm1.parity.shards import norms_of, relative_errors, shards, squared_errors, whole_tensors
from megatron_mm1.training.build import named_parameters
from megatron_mm1.training.checkpointing import training_state
from megatron_mm1.training.saving import save_checkpoint
from megatron_mm1.training.step import update_weights
from tests.parallel.jobs import Run, with_parallel
from tests.parallel.test_parity import SMALL

STEPS = 4
LR, DECAY, CLIP = 1e-2, 0.1, 3.0
TP, PP, EP, ETP = (
    f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
)
LAYOUTS = {
    "mm1-tiny: one process": (1, {}),
    "mm1-tiny: TP2+SP": (2, {TP: 2, "sequence_parallel": True}),
    "mm1-tiny: TP2, images shared out": (2, {TP: 2, "vision_parallel_mode": "data"}),
    "mm1-tiny: PP2": (2, {PP: 2}),
    "mm1-tiny: PP2 VPP2": (2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}),
    "mm1-tiny: DP2": (2, {}),
    "mm1-tiny: CP2": (2, {"context_parallel_size": 2}),
    "mm1-tiny: one process, bf16": (1, {}),
    "mm1-tiny: TP2+SP, bf16": (2, {TP: 2, "sequence_parallel": True}),
    "mm1-tiny adapters: one process": (1, {}),
    "mm1-tiny adapters: TP2+SP": (2, {TP: 2, "sequence_parallel": True}),
    "mm1-tiny-moe: one process": (1, {}),
    "mm1-tiny-moe: EP2": (2, {EP: 2}),
    "mm1-tiny-moe: TP2+SP EP2": (2, {TP: 2, "sequence_parallel": True, EP: 2}),
    "mm1-tiny-moe: TP2+SP ETP2": (2, {TP: 2, "sequence_parallel": True, ETP: 2}),
}
SLOW = ("mm1-tiny: TP2, images shared out", "mm1-tiny: PP2 VPP2", "mm1-tiny: one process, bf16")
JOURNEYS = [
    ("mm1-tiny: TP2+SP", "mm1-tiny: one process"),
    ("mm1-tiny: one process", "mm1-tiny: PP2"),
    ("mm1-tiny: DP2", "mm1-tiny: TP2+SP"),
    ("mm1-tiny: TP2+SP, bf16", "mm1-tiny: one process, bf16"),
    ("mm1-tiny adapters: TP2+SP", "mm1-tiny adapters: one process"),
    ("mm1-tiny-moe: TP2+SP ETP2", "mm1-tiny-moe: EP2"),
]
ADAPTERS = [
    "--model.lora.rank",
    "4",
    "--model.lora.alpha",
    "8",
    "--model.lora.tower_targets",
    "[linear_qkv, linear_fc2]",
]


def config_of(layout: str):
    options = ["--optimizer", "adafactor", "--lr", str(LR), "--weight_decay", str(DECAY), "--clip_grad", str(CLIP)]
    options += ["--lr_warmup_iters", "1", "--train_iters", "8", "--global_batch_size", "8"]
    options += ["--precision", "bf16" if "bf16" in layout else "fp32"]
    model, *adapters = layout.split(":")[0].split()
    options += ADAPTERS if adapters else []
    return with_parallel(parity_config(["--preset", model, *SMALL, *options]), **LAYOUTS[layout][1])


def random_tensor(name: str, shape, *, seed: int) -> torch.Tensor:
    """A gradient, whose rows are of sizes from 1e-4 to 20; weights of one size where the seed is negative."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    rows = torch.rand(*shape[:-1], 1, generator=generator).mul(12).sub(9).exp() if seed >= 0 else 0.1
    return torch.randn(shape, generator=generator) * rows


@torch.no_grad()
def fill(run: Run, value_of, *, seed: int) -> None:
    """Give this rank its parts of the same random tensors in every layout."""
    for shard in shards(run.model, value_of, pg_collection=run.groups):
        shard.data.copy_(shard.of(random_tensor(shard.name, shard.shape, seed=seed)))


def master(parameter):
    """The float32 weights that are updated; a bf16 model has a copy of its own."""
    return getattr(parameter, "main_param", parameter)


def steps(run: Run, numbers) -> None:
    for number in numbers:
        run.scheduler.step(8)
        fill(run, main_grad, seed=number)
        assert update_weights(run.config, run.optimizer)[1]


def weights(run: Run):
    return shards(run.model, master, pg_collection=run.groups)


def reference(config, folder: Path) -> None:
    """In one process: transformers' steps on the model's own, whole parameters."""
    from transformers import Adafactor

    run = Run(config)
    fill(run, master, seed=-1)
    torch.save(whole_tensors(weights(run)), folder / "before.pt")
    parameters = [parameter for _, parameter in named_parameters(run.model) if parameter.requires_grad]
    optimizer = Adafactor(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        scale_parameter=False,
        relative_step=False,
    )
    for number in range(STEPS):
        run.scheduler.step(8)
        fill(run, main_grad, seed=number)
        for parameter in parameters:
            parameter.grad = parameter.main_grad.clone()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = run.optimizer.param_groups[0]["lr"]
        optimizer.step()
    torch.save(whole_tensors(weights(run)), folder / "after.pt")
    run.close()


def train(config, folder: Path):
    """On each rank: all steps, against the reference."""
    run = Run(config)
    fill(run, master, seed=-1)
    steps(run, range(STEPS))
    errors = squared_errors(weights(run), torch.load(folder / "after.pt"))
    run.close()
    return errors


def train_and_save(config, folder: Path) -> Path:
    """On each rank: half of the steps."""
    run = Run(config)
    fill(run, master, seed=-1)
    steps(run, range(STEPS // 2))
    metadata = CheckpointMetadata(
        iteration=STEPS // 2,
        consumed_sequences=8 * STEPS // 2,
        config=to_dict(config),
        tokenizer_fingerprint="",
        plan_fingerprint="",
        world_size=torch.distributed.get_world_size(),
    )
    path = save_checkpoint(
        folder, metadata, training_state(run.model, run.optimizer, run.scheduler, pg_collection=run.groups)
    )
    run.close()
    return path


def written_once(config):
    """On each rank: name and place of the blocks of the optimizer's state that it writes."""
    run = Run(config)
    steps(run, range(1))
    state = training_state(run.model, run.optimizer, run.scheduler, pg_collection=run.groups)
    apply_factories(state)
    blocks = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    run.close()
    return [
        (part.key, part.global_offset)
        for part in blocks
        if part.key.startswith(OPTIMIZER_PREFIX) and is_main_replica(part.replica_id)
    ]


def resume_and_train(config, checkpoint: Path, folder: Path):
    """On each rank: the other half, over other weights so that gaps show."""
    run = Run(config)
    fill(run, master, seed=-2)
    run.load(checkpoint)
    steps(run, range(STEPS // 2, STEPS))
    errors = squared_errors(weights(run), torch.load(folder / "after.pt"))
    run.close()
    return errors


@pytest.fixture(scope="module")
def references(pool, tmp_path_factory):
    """`references(model)`: the folder with transformers' weights."""
    known = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            pool(1).run(reference, config_of(f"{name}: one process"), known[name])
        return known[name]

    return get


def assert_equal(ranks, folder: Path) -> None:
    """Every parameter within 1e-5 of its update."""
    before, after = torch.load(folder / "before.pt"), torch.load(folder / "after.pt")
    updates = norms_of({name: after[name] - before[name] for name in after})
    assert min(updates.values()) > 0
    errors = relative_errors(ranks, after, scales=updates)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-5, worst


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_every_layout_takes_transformers_steps(pool, references, layout):
    folder = references(layout.split(":")[0])
    assert_equal(pool(LAYOUTS[layout][0]).run(train, config_of(layout), folder), folder)


@pytest.mark.parametrize(("saved_in", "resumed_in"), JOURNEYS)
def test_its_state_goes_into_any_layout(pool, references, tmp_path, saved_in, resumed_in):
    folder = references(saved_in.split(":")[0])
    checkpoint = pool(LAYOUTS[saved_in][0]).run(train_and_save, config_of(saved_in), tmp_path)[0]
    ranks = pool(LAYOUTS[resumed_in][0]).run(resume_and_train, config_of(resumed_in), checkpoint, folder)
    assert_equal(ranks, folder)


@pytest.mark.parametrize("layout", ["mm1-tiny: TP2+SP", "mm1-tiny: DP2", "mm1-tiny-moe: TP2+SP ETP2"])
def test_one_rank_writes_what_several_have(pool, layout):
    """A column of a matrix whose rows are shared out is the same on all tensor-parallel ranks."""
    blocks = [block for rank in pool(LAYOUTS[layout][0]).run(written_once, config_of(layout)) for block in rank]
    assert blocks and len(blocks) == len(set(blocks))


def test_its_state_is_small(pool, tmp_path):
    """A row and a column in place of each matrix: what a checkpoint of one process holds beside the weights."""
    [checkpoint] = pool(1).run(train_and_save, config_of("mm1-tiny: one process"), tmp_path)
    sizes = {name: math.prod(entry.shape) for name, entry in MM1Checkpoint(checkpoint).tensors.items()}
    state = sum(size for name, size in sizes.items() if name.startswith("optimizer."))
    assert 0 < state < 0.1 * sum(size for name, size in sizes.items() if not name.startswith("optimizer."))
