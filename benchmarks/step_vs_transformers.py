"""One training step on a CPU: ours against the equal transformers model at its best.

    OMP_NUM_THREADS=2 python benchmarks/step_vs_transformers.py

Ours is the trainer's path: `build_model`, `build_optimizer` and `train_step` on a `PackedBatch` in one process. Theirs
is LlavaForConditionalGeneration as its users would train it: SDPA without a mask (so that torch takes its causal
kernel), no cache, the model's own loss, one pass of clipping, fused AdamW. Both start from the same weights, see the
same batches, and their first losses must agree before anything is timed. The two take turns in one process (ours,
theirs, theirs, ours, ..), and what counts is the median of the ratios of neighbours: a machine that slows down slows
both. Goal: at most the same time; the exit code asks for no more than 1.05 times.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from goals import Goal, report
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import megatron_mm1.parallel  # noqa: F401  # before megatron-core is imported
from megatron_mm1.checkpoint.families import import_tensors
from megatron_mm1.checkpoint.local_state import local_state_dict
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.config import ConnectorConfig, MM1Config, VisionConfig
from megatron_mm1.config.presets import preset
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.parallel.groups import build_process_groups, initialize_process_group
from megatron_mm1.training.build import build_model, build_optimizer, unwrap
from megatron_mm1.training.step import train_step

POSITIONS, SIDE, PATCH = 512, 112, 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
IMAGE_START = 8
IMAGE_ID = 3
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-4, 0.01
GOAL, ACCEPTED = 1.0, 1.05


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time a training step against the equal transformers model.")
    parser.add_argument("--pairs", type=int, default=20, metavar="N", help="pairs of steps timed (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps of each before (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of both models (%(default)s)")
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    torch.set_num_threads(args.threads)
    config = model_config()
    theirs = Theirs(config)
    ours = Ours(config, theirs.model.state_dict())
    differences = [abs(ours.step(batch(0)) - theirs.step(batch(0)))]
    pairs = []
    for number in range(1, args.warm_up + args.pairs + 1):
        pair, difference = timed_pair(ours, theirs, batch(number), ours_first=number % 2 == 1)
        differences.append(difference)
        pairs.append(pair)
    return judge(config, ours, theirs, pairs=pairs[args.warm_up :], differences=differences)


def model_config() -> MM1Config:
    """mm1-85m's decoder on 512 positions behind a small tower whose every patch is a token; constant rate."""
    config = preset("mm1-85m")
    vision = VisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        num_layers=6,
        hidden_size=384,
        ffn_hidden_size=1536,
        num_attention_heads=6,
        final_layernorm=False,  # LLaVA takes the features as the last block leaves them
    )
    connector = ConnectorConfig(connector="mlp", tokens_per_image=IMAGE_TOKENS)
    return replace(
        config,
        model=replace(config.model, vision=vision, connector=connector),
        data=replace(config.data, sources=(), seq_length=POSITIONS),
        optimizer=replace(config.optimizer, lr=1e-4, connector_lr=None, lr_warmup_iters=0, min_lr_ratio=1.0),
        training=replace(
            config.training, micro_batch_size=1, global_batch_size=1, precision="fp32", layer_backend="local"
        ),
    )


def batch(number: int) -> PackedBatch:
    """One example that fills the sequence: text, an image, text; random, and another for every number.

    Labels are next tokens, IGNORE where the next position is of the image or none.
    """
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(10, 32000, (1, POSITIONS), generator=generator)
    slots = torch.arange(IMAGE_START, IMAGE_START + IMAGE_TOKENS)
    tokens[0, slots] = IMAGE_ID
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    labels = tokens.roll(-1, dims=1)
    labels[0, -1] = IGNORE
    labels[labels == IMAGE_ID] = IGNORE
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(POSITIONS)[None],
        segment_ids=torch.ones(1, POSITIONS, dtype=torch.int32),
        source_ids=torch.zeros_like(tokens),
        images=(ImageGroup(slots=slots[None], height=SIDE, width=SIDE, pixels=pixels),),
    )


class Ours:
    """The trainer's model and optimizer, started from LLaVA's weights."""

    def __init__(self, config: MM1Config, llava_state: dict[str, Tensor]) -> None:
        initialize_process_group(timeout_minutes=1)
        self.config = config
        self.groups = build_process_groups(config.parallel, seed=config.training.seed)
        self.model = build_model(config, backend="local", pg_collection=self.groups)
        state = local_state_dict(collect(import_tensors("llava", config.model, StateDict(llava_state))))
        missing, unexpected = unwrap(self.model[0]).load_state_dict(state, strict=False)
        if unexpected or any(not name.endswith("_extra_state") for name in missing):
            raise ValueError(f"the two models differ: missing {missing}, unexpected {unexpected}")
        self.optimizer, self.scheduler = build_optimizer(config, self.model, pg_collection=self.groups)
        self.parameters = sum(parameter.numel() for parameter in self.model[0].parameters())

    def step(self, batch: PackedBatch) -> float:
        """One step; its loss before the update."""
        result = train_step(self.config, self.model, self.optimizer, self.scheduler, [batch], pg_collection=self.groups)
        return result.losses.loss


class Theirs:
    """transformers' LLaVA of the same shape, with the optimizer its users would choose."""

    def __init__(self, config: MM1Config) -> None:
        vision, decoder, optimizer = config.model.vision, config.model.decoder, config.optimizer
        torch.manual_seed(config.training.seed)
        llava = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.ffn_hidden_size,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_attention_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            ),
            text_config=LlamaConfig(
                vocab_size=decoder.vocab_size,
                hidden_size=decoder.hidden_size,
                intermediate_size=decoder.ffn_hidden_size,
                num_hidden_layers=decoder.num_layers,
                num_attention_heads=decoder.num_attention_heads,
                num_key_value_heads=decoder.num_attention_heads,
                rms_norm_eps=decoder.layernorm_epsilon,
                use_cache=False,
            ),
            image_token_id=IMAGE_ID,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            attn_implementation="sdpa",
        )
        self.model = LlavaForConditionalGeneration(llava).train()
        self.clip_grad = optimizer.clip_grad
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        used = list(self.model.parameters())
        groups = [
            {"params": [parameter for parameter in used if parameter.ndim > 1], "weight_decay": optimizer.weight_decay},
            {"params": [parameter for parameter in used if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optimizer.lr,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
            fused=True,
        )

    def step(self, batch: PackedBatch) -> float:
        """One step; its loss before the update."""
        [image] = batch.images
        labels = batch.tokens.masked_fill(batch.tokens == IMAGE_ID, IGNORE)  # the model shifts them itself
        loss = self.model(input_ids=batch.tokens, pixel_values=image.pixels, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def timed_pair(
    ours: Ours, theirs: Theirs, batch: PackedBatch, *, ours_first: bool
) -> tuple[tuple[float, float], float]:
    """((seconds of our step, of theirs), difference of the losses) on one batch."""
    seconds, losses = {}, {}
    for side in (ours, theirs) if ours_first else (theirs, ours):
        started = time.perf_counter()
        losses[side] = side.step(batch)
        seconds[side] = time.perf_counter() - started
    return (seconds[ours], seconds[theirs]), abs(losses[ours] - losses[theirs])


def judge(
    config: MM1Config,
    ours: Ours,
    theirs: Theirs,
    *,
    pairs: Sequence[tuple[float, float]],
    differences: Sequence[float],
) -> int:
    """Print what was run and what came out; the exit code."""
    ratios = [first / second for first, second in pairs]
    ratio = statistics.median(ratios)
    difference = abs(ours.parameters - theirs.parameters) / theirs.parameters
    decoder, vision = config.model.decoder, config.model.vision
    settings = {
        "decoder": f"{decoder.num_layers} x {decoder.hidden_size}, {decoder.num_attention_heads} heads, "
        f"feed-forward {decoder.ffn_hidden_size}, vocabulary {decoder.vocab_size}",
        "tower": f"{vision.num_layers} x {vision.hidden_size}, {vision.image_size} px, patches of {vision.patch_size}",
        "sequence": f"1 of {POSITIONS} positions, {IMAGE_TOKENS} of them an image's; float32",
        "parameters": f"ours {ours.parameters:,}, theirs {theirs.parameters:,}",
        "threads": torch.get_num_threads(),
        "processor": f"{processor()}, {os.cpu_count()} logical",
        "load average": f"{os.getloadavg()[0]:.1f} (others that run too make the ratios scatter)",
        **{package: version(package) for package in ("transformers", "megatron-core")},
        "step, median seconds": "ours {:.3f}, theirs {:.3f}".format(*map(statistics.median, zip(*pairs, strict=True))),
        "ratios": " ".join(f"{ratio:.3f}" for ratio in sorted(ratios)),
        "largest difference of losses": f"{max(differences):.1e}",
        "goal": f"{GOAL:g}: {'met' if ratio <= GOAL else 'missed'}; the verdict below is on {ACCEPTED:g}, accepted",
    }
    return report(
        settings,
        [
            Goal("first_loss_difference", differences[0], "nats/token", "<", LOSS_TOLERANCE),
            Goal("parameter_difference", difference, "share", "<", PARAMETER_TOLERANCE),
            Goal("step_time_ratio", ratio, "ours/theirs", "<", ACCEPTED),
        ],
    )


def processor() -> str:
    """The CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
