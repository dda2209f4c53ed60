"""`mm1 bench step` in one process: which part of a step counts for what, and what the command leaves.

Where delays are counted the clock has a time of its own, in which nothing takes any time but the delays.
"""

import json
import subprocess
import sys

import pytest
import torch

from megatron_mm1.bench.clock import COLLECTIVES, DATA, DECODER, OPTIMIZER, PARTS, TOWER, Clock
from megatron_mm1.bench.instruments import instrumented
from megatron_mm1.bench.report import FILE, RankTimes, StepReport
from megatron_mm1.bench.step import StepBench, repeated_batches
from megatron_mm1.checkpoint.format import CheckpointMetadata
from megatron_mm1.cli import main
from megatron_mm1.config.loading import load_config, to_dict
from megatron_mm1.training import step as training_step
from megatron_mm1.training.build import named_parameters, unwrap
from megatron_mm1.training.checkpointing import training_state
from megatron_mm1.training.saving import save_checkpoint
from tests.parallel.slowed import SMALL, Delay

ONE_PROCESS = ["--preset", "mm1-tiny", "--tensor_model_parallel_size", "1", "--vision_parallel_mode", "tensor", *SMALL]


@pytest.fixture
def bench(groups):
    """`bench(kind of batch, *options)`: on this process."""

    def make(kind="mixed", *options):
        config = load_config([*ONE_PROCESS, *options])
        torch.manual_seed(0)
        return StepBench(config, repeated_batches(config, kind, dp_size=1), backend="local", pg_collection=groups)

    return make


class Time:
    """Stands still but for delays."""

    def __init__(self, bench):
        self.now = 0.0
        bench.clock = Clock(lambda: None, timer=lambda: self.now)

    def delay(self):
        return Delay(self.advance)

    def advance(self):
        self.now += 1.0


def seconds(bench):
    """Of the parts of one instrumented step, those that are not zero."""
    _, parts = bench.take_apart(1, warmup=0)
    return {part: value for part, value in parts.items() if value}


VARIANTS = {
    "as it is": ["mixed"],
    "no image": ["no image"],
    "images of two sizes, encoded apart": ["two resolutions"],
    "tower recomputed": ["two resolutions", "--vision_recompute", "true"],
    "decoder recomputed": ["mixed", "--recompute_granularity", "full"],
    "modules recomputed": [
        *("mixed", "--recompute_granularity", "selective", "--recompute_modules", "[core_attn, mlp]"),
        *("--vision_recompute", "true"),
    ],
    "frozen tower": ["mixed", "--freeze", "[tower]"],
    "frozen connector": ["mixed", "--freeze", "[connector]"],
    "frozen tower and connector": ["mixed", "--freeze", "[tower, connector]"],
    "frozen decoder": ["mixed", "--freeze", "[decoder]"],
    "frozen decoder, tower recomputed": ["mixed", "--freeze", "[decoder]", "--vision_recompute", "true"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_forward_and_backward_counts_for_its_own_component(bench, variant):
    """Delays in the first and last modules of tower, connector and decoder, in both directions."""
    bench = bench(*VARIANTS[variant])
    time, stage = Time(bench), unwrap(bench.model[0])
    tower, decoder = time.delay(), time.delay()
    tower.slow(stage.tower.patch_embedding, *list(stage.connector.children())[:-1])
    decoder.slow(stage.language_model.embedding.word_embeddings, stage.language_model.output_layer)
    for name, module in stage.named_modules():
        if name.endswith(("linear_fc1", "linear_proj")):
            (tower if name.startswith("tower") else decoder).slow(module)
    bench.step()
    assert decoder.backward > 0
    assert (tower.backward > 0) == (variant != "frozen tower and connector")
    tower.count = decoder.count = 0
    measured = seconds(bench)
    assert measured == {TOWER: tower.count, DECODER: decoder.count}


def slow_loader(bench, delay):
    bench.batches = delay.after_each(bench.batches)


def slow_collectives(bench, delay):
    for name in ("all_reduce", "broadcast"):
        delay.patch(torch.distributed, name)


def slow_clipping(bench, delay):
    delay.patch(training_step, "clip_grads_with_norm_")


def slow_optimizer(method):
    return lambda bench, delay: delay.patch(bench.optimizer, method)


@pytest.mark.parametrize(
    ("slow", "part"),
    [
        pytest.param(slow_loader, DATA, id="loader"),
        pytest.param(slow_collectives, COLLECTIVES, id="collectives"),
        pytest.param(slow_clipping, OPTIMIZER, id="clipping"),
        *(
            pytest.param(slow_optimizer(method), OPTIMIZER, id=f"optimizer.{method}")
            for method in ("zero_grad", "prepare_grads", "get_grad_norm", "step_with_ready_grads")
        ),
    ],
)
def test_a_delay_counts_for_its_part_and_no_other(bench, slow, part):
    bench = bench()
    delay = Time(bench).delay()
    with delay:
        slow(bench, delay)
        assert seconds(bench) == {part: delay.count}
    assert delay.count > 0


def test_parts_are_not_negative_and_add_up_to_the_step(bench):
    apart, parts = bench().take_apart(2)
    assert list(parts) == list(PARTS)
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(apart, rel=0.02, abs=0.02)
    assert min(parts[part] for part in (TOWER, DECODER, OPTIMIZER, COLLECTIVES)) > 0


def test_instruments_change_no_result(bench):
    plain, taken_apart = bench(), bench()
    expected = [plain.step() for _ in range(2)]
    with (
        instrumented(taken_apart.model, taken_apart.optimizer, taken_apart.clock, pg_collection=taken_apart.groups),
        taken_apart.clock.running(),
    ):
        assert [taken_apart.step() for _ in range(2)] == expected
    weights = dict(named_parameters(plain.model))
    assert all(torch.equal(weight, weights[name]) for name, weight in named_parameters(taken_apart.model))


def test_nothing_stays_replaced(bench):
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings

    bench = bench()
    stage = unwrap(bench.model[0])
    places = [
        *((torch.distributed, name) for name in ("all_reduce", "all_gather", "batch_isend_irecv")),
        (mappings, "dist_all_gather_func"),
        (schedules, "backward_step"),
    ]
    owners = (stage, bench.model[0], bench.optimizer)
    before = [getattr(owner, name) for owner, name in places], [set(vars(owner)) for owner in owners]
    with instrumented(bench.model, bench.optimizer, bench.clock, pg_collection=bench.groups):
        assert all(getattr(owner, name) is not old for (owner, name), old in zip(places, before[0], strict=True))
    assert ([getattr(owner, name) for owner, name in places], [set(vars(owner)) for owner in owners]) == before
    assert not stage.language_model.embedding._forward_hooks


def test_weights_can_be_those_of_a_checkpoint(bench, tmp_path):
    trained = bench()
    with torch.no_grad():
        for _, weight in named_parameters(trained.model):
            weight.add_(torch.rand_like(weight))
    metadata = CheckpointMetadata(
        iteration=1, consumed_sequences=2, config=to_dict(trained.config), tokenizer_fingerprint="", plan_fingerprint=""
    )
    save_checkpoint(
        tmp_path,
        metadata,
        training_state(trained.model, trained.optimizer, trained.scheduler, pg_collection=trained.groups),
    )
    loaded = bench("mixed", "--checkpoint.load", str(tmp_path))
    weights = dict(named_parameters(trained.model))
    assert all(torch.equal(weight, weights[name]) for name, weight in named_parameters(loaded.model))


def test_report():
    """Each step takes as long as its slowest rank; the median of the steps counts."""
    parts = dict.fromkeys(PARTS, 0.0)
    ranks = (
        RankTimes((1.0, 4.0, 2.0), 0.25, 4.0, parts | {TOWER: 3.0, DECODER: 1.0}),
        RankTimes((3.0, 1.0, 2.0), 0.5, 4.0, parts | {DECODER: 4.0}),
    )
    report = StepReport(settings={"model": "m"}, ranks=ranks, positions=300, images=6, flops_per_device=6e12)
    record = json.loads(json.dumps(report.record()))
    assert record["step"] == {
        "seconds": 3.0,
        "tokens_per_second": 100.0,
        "images": 6,
        "images_per_second": 2.0,
        "tflops_per_device": 2.0,
        "data_wait": 0.5,
    }
    assert record["instrumented"]["seconds"] == {"mean": 4.0, "max": 4.0}
    assert record["instrumented"]["parts"][TOWER] == {"mean": 1.5, "max": 3.0, "by_rank": [3.0, 0.0]}
    lines = report.table().splitlines()
    assert lines[1] == "100 tokens/s, 2.0 images/s, 2 model TFLOP/s per device"
    assert next(line.split() for line in lines if line.startswith(TOWER)) == [TOWER, "1,500.0", "3,000.0", "37.5%"]


def test_command(tmp_path):
    options = ["--synthetic", "two resolutions", "--steps", "2", "--warmup", "1", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "megatron_mm1", "bench", "step", *ONE_PROCESS, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    record = json.loads((tmp_path / FILE).read_text())
    assert {"model": "mm1-tiny", "layout": "1 process", "data": "two resolutions", "steps": 2}.items() <= (
        record["settings"].items()
    )
    assert list(record["instrumented"]["parts"]) == list(PARTS)
    assert record["step"]["tokens_per_second"] == pytest.approx(2 * 128 / record["step"]["seconds"])
    printed = done.stdout.splitlines()
    assert printed[0] == "model: mm1-tiny"  # settings come first
    assert printed[-1] == f"report: {tmp_path / FILE}"
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--synthetic", "nothing"], "no kind of batch 'nothing': --synthetic takes one of mixed, no image,"),
        (["--synthetic", "--text_only", "true"], "data.text_only leaves images out"),
        (["--tensor_model_parallel_size", "7"], "7"),
    ],
)
def test_what_the_command_refuses(capsys, options, error):
    assert main(["bench", "step", *ONE_PROCESS, *options]) == 2
    assert error in capsys.readouterr().err
