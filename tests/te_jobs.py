"""What workers that have the stand-in for Transformer Engine run: its backend beside the local one."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_mm1.config import Fp8Config, MM1Config
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.requests import GenerationRequest, Score, ScoringRequest
from megatron_mm1.model.lora import is_adapter
from megatron_mm1.model.vision import FUSED_NORM_NAMES
from megatron_mm1.parallel.context import local_positions
from megatron_mm1.parallel.device import device
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training.build import build_model, build_module, unwrap
from megatron_mm1.training.fp8_scales import with_scales
from megatron_mm1.training.sharding import NAMING
from megatron_mm1.training.step import evaluate_batches
from tests.parallel import jobs

_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)$")


def te_name(name: str, others: Mapping[str, Tensor]) -> str:
    """The name in `others`, of the Transformer Engine backend, of a parameter of the local backend."""
    name = _EXPERT.sub(r"experts.\2\1", name)
    if name in others:
        return name
    for norm, fused in FUSED_NORM_NAMES.items():
        name = name.replace(norm, fused)
    return name


def distance(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value of the reference (1 where that is all zeros)."""
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    return float((ours - reference).abs().max()) / (scale or 1.0) if reference.numel() else 0.0


def copy_weights(local: torch.nn.Module, te: torch.nn.Module) -> None:
    """Distinct values for every parameter of `local`, norms and biases too, and the same for `te`."""
    generator = torch.Generator().manual_seed(5 + torch.distributed.get_rank())
    others = dict(te.named_parameters())
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            if parameter.dim() == 1 or is_adapter(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            others.pop(te_name(name, others)).copy_(parameter)
    assert not others, f"without a counterpart in the local backend: {sorted(others)}"


def _loss_and_gradients(model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = model(batch)
    trained = local_positions(batch.labels.flatten(), unwrap(model).pg_collection.cp) != IGNORE
    losses[trained].sum().backward()
    return losses.detach()[trained], {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def compare(config: MM1Config, kinds: tuple[str, ...]) -> dict[str, float]:
    """Distance of the backends' losses, gradients and (of one process) logits on batches of some kinds, by name."""
    groups = build_process_groups(config.parallel, seed=1)
    local = build_module(dataclasses.replace(config, fp8=Fp8Config()), backend="local", pg_collection=groups)
    te = build_module(config, backend="transformer_engine", pg_collection=groups)
    copy_weights(local, te)
    distances = {}
    for kind in kinds:
        batch = synthetic_batches(config, kind)[0].to(device())
        if torch.distributed.get_world_size() == 1:
            with torch.no_grad():
                logits, expected_logits = (model(batch, return_logits=True) for model in (te, local))
            distances[f"{kind}: logits"] = distance(logits, expected_logits)
        losses, gradients = _loss_and_gradients(te, batch)
        expected_losses, expected = _loss_and_gradients(local, batch)
        distances[f"{kind}: losses"] = distance(losses, expected_losses)
        assert len(gradients) == len(expected)
        for name, gradient in expected.items():
            distances[f"{kind}: {name}"] = distance(gradients[te_name(name, gradients)], gradient)
    destroy_process_groups()
    return distances


def score(config: MM1Config, requests: list[ScoringRequest]) -> tuple[list[Score], list[Score], list[str], list[str]]:
    """Scores, and texts generated behind the same prompts, by Transformer Engine's backend and by the local one."""
    groups = build_process_groups(config.parallel, seed=1)
    local = build_module(dataclasses.replace(config, fp8=Fp8Config()), backend="local", pg_collection=groups)
    te = build_module(config, backend="transformer_engine", pg_collection=groups)
    copy_weights(local, te)
    # Alike on tensor-parallel ranks: how positions are split over them differs between the backends.
    for parameter in [*local.parameters(), *te.parameters()]:
        if parameter.dim() == 1:
            torch.distributed.broadcast(parameter.data, group=groups.tp, group_src=0)
    tokenizer = open_tokenizer(config.data.tokenizer)
    scores, texts = [], []
    for model in (te, local):
        engine = Engine(config, model, tokenizer, pg_collection=groups)
        scores.append(engine.score(requests))
        continued = [GenerationRequest(prompt=request.prompt, max_new_tokens=5) for request in requests]
        texts.append([answer.text for answer in engine.generate(continued)])
    destroy_process_groups()
    return scores[0], scores[1], texts[0], texts[1]


def without_attention_kernels(config: MM1Config, *, component: str) -> str:
    """What is said where Transformer Engine has no kernel for the attention of a component, "tower" or "decoder"."""
    groups = build_process_groups(config.parallel, seed=1)
    model = build_module(config, backend="transformer_engine", pg_collection=groups)
    said = "nothing"
    with pytest.MonkeyPatch.context() as environment:
        part = {"tower": unwrap(model).tower, "decoder": unwrap(model).language_model}[component]
        part.register_forward_pre_hook(lambda *_: environment.setenv("NVTE_FUSED_ATTN", "0"))
        try:
            model(synthetic_batches(config, "mixed")[0].to(device()))
        except UserError as error:
            said = str(error)
    destroy_process_groups()
    return said


@dataclass(frozen=True)
class Use:
    """What one layer of Transformer Engine went through.

    Attributes:
        kind: its class in Transformer Engine.
        made_in: the recipe in which its weights were made; None: as plain numbers.
        recipes: in force at its forward passes, in turn; None: high precision.
        groups: ranks that agreed on amax at those passes that had a recipe.
    """

    kind: str
    made_in: str | None
    recipes: tuple[str | None, ...]
    groups: tuple[tuple[int, ...], ...]


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every layer of Transformer Engine by name."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    return {name: module for name, module in model.named_modules() if isinstance(module, TransformerEngineBaseModule)}


def te_class(module: torch.nn.Module) -> str:
    """The name of Transformer Engine's class that a module is."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformer_engine"))


def _name_of(recipe: object) -> str | None:
    from transformer_engine.common import recipe as recipes

    names = {
        recipes.DelayedScaling: "fp8_delayed",
        recipes.Float8CurrentScaling: "fp8_tensorwise",
        recipes.Float8BlockScaling: "fp8_blockwise",
    }
    return None if recipe is None else next(name for kind, name in names.items() if isinstance(recipe, kind))


def _ranks(group: torch.distributed.ProcessGroup | None) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD))


def use_of_layers(config: MM1Config, *, backward: bool = False) -> dict[str, Use]:
    """How each of this rank's layers was used in a step, or in one forward pass of its own stage's batch."""
    groups = build_process_groups(config.parallel, seed=1)
    model = build_module(config, backend="transformer_engine", pg_collection=groups)
    stage = unwrap(model)
    batch = synthetic_batches(config, "mixed")[0].to(device())
    if not stage.pre_process:
        positions, width = batch.tokens.numel(), config.model.decoder.hidden_size
        stage.set_input_tensor(torch.ones(positions, 1, width, dtype=torch.bfloat16, requires_grad=True))
    output = model(batch)
    if backward:
        output.float().sum().backward()
    used = {
        name: Use(
            te_class(layer),
            _name_of(layer.te_initialised_in),
            tuple(_name_of(call.recipe) for call in layer.te_calls),
            tuple(_ranks(call.amax_group) for call in layer.te_calls if call.recipe is not None),
        )
        for name, layer in layers_of(stage).items()
    }
    destroy_process_groups()
    return used


def weights_renewed(config: MM1Config, *, passes: int) -> set[tuple[bool, ...]]:
    """For the layers that keep an FP8 copy of their weights: whether each microbatch of some passes made it anew."""
    groups = build_process_groups(config.parallel, seed=1)
    model = build_model(config, backend="transformer_engine", pg_collection=groups)
    renewed: dict[str, list[bool]] = {}
    for name, module in unwrap(model[0]).named_modules():
        if hasattr(module, "is_first_microbatch"):
            seen = renewed.setdefault(name, [])
            module.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.is_first_microbatch))
    for _ in range(passes):
        evaluate_batches(config, model, synthetic_batches(config, "mixed"), pg_collection=groups)
    destroy_process_groups()
    return {tuple(seen) for seen in renewed.values()}


class _ScaledRun(jobs.Run):
    """A run in Transformer Engine's backend."""

    backend = "transformer_engine"

    def scales(self) -> dict[str, dict[str, Tensor]]:
        """Those that a checkpoint would have, by their names in it."""
        found = {}
        for stage in map(unwrap, self.model):
            described = stage.sharded_state_dict(metadata={**NAMING, "dp_cp_group": self.groups.dp_cp})
            found |= {
                entry.unique_key: entry.data
                for entry in with_scales(stage, described).values()
                if isinstance(entry, ShardedObject)
            }
        return found


def save_scales(config: MM1Config, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Save after two steps; this rank's scales."""
    run = _ScaledRun(config)
    for _ in range(2):
        run.step(run.share(synthetic_batches(config, "mixed")))
    run.save(folder, iteration=2)
    scales = run.scales()
    run.close()
    return scales


def load_scales(config: MM1Config, checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """This rank's scales once the checkpoint is loaded, and the components said to start without."""
    run = _ScaledRun(config)
    without = run.load(checkpoint)
    scales = run.scales()
    run.step(run.share(synthetic_batches(config, "mixed")))  # goes on
    run.close()
    return scales, without
