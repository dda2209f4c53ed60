"""Model, optimizer and learning-rate schedule from the configuration."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_mm1.config import MM1Config, OptimizerConfig
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.derived import COMPONENTS
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.parallel.device import device
from megatron_mm1.training.accumulation import accumulate_in_place
from megatron_mm1.training.adafactor import AdaFactor

Model = list[DistributedDataParallel]
"""A rank's part of the model: one stage, or several in turns under virtual pipelining."""

_ATTRIBUTES = {prefix.removesuffix("."): component for component, prefix in COMPONENTS.items()}


def component_of(parameter_name: str) -> str:
    """Which of COMPONENTS a parameter of the (wrapped) model belongs to."""
    return next(_ATTRIBUTES[part] for part in parameter_name.split(".") if part in _ATTRIBUTES)


def unwrap(model: torch.nn.Module) -> MM1Model:
    """The MM1Model inside data-parallel and precision wrappers."""
    while not isinstance(model, MM1Model):
        model = model.get_submodule("module")
    return model


def build_module(
    config: MM1Config, *, backend: str, pg_collection: ProcessGroupCollection, vp_stage: int | None = None
) -> torch.nn.Module:
    """This rank's stage of the model (or its virtual stage) on this rank's device, in the configured precision."""
    model: torch.nn.Module = MM1Model(config, backend=backend, pg_collection=pg_collection, vp_stage=vp_stage)
    if config.training.precision == "bf16":
        model = Float16Module(model.config, model)
    model = model.to(device())
    unwrap(model).equalize_vision_weights()
    return model


def build_model(config: MM1Config, *, backend: str, pg_collection: ProcessGroupCollection) -> Model:
    """This rank's stages of the model, wrapped for data-parallel training.

    In bf16, weights are bf16 and gradients are accumulated and reduced in float32.
    """
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual):
        module = build_module(
            config, backend=backend, pg_collection=pg_collection, vp_stage=vp_stage if virtual > 1 else None
        )
        chunk = DistributedDataParallel(
            unwrap(module).config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.parallel.use_distributed_optimizer,
                overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                fp8_param_gather=config.fp8.fp8_param,
            ),
            module,
            disable_bucketing=vp_stage > 0,  # small next to the first stage's, and reduced in one piece
            pg_collection=pg_collection,
        )
        chunk.broadcast_params()
        if device().type == "cpu":
            accumulate_in_place(chunk)
        chunks.append(chunk)
    no_sync = [chunk.no_sync for chunk in chunks]
    for chunk in chunks:  # the schedules read the first one's
        unwrap(chunk).config.no_sync_func = no_sync if virtual > 1 else no_sync[0]
        unwrap(chunk).config.finalize_model_grads_func = _finalize_gradients
    return chunks


def named_parameters(model: Model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of all of this rank's stages; names can repeat, since each counts its layers from 0."""
    for chunk in model:
        yield from chunk.named_parameters()


def _finalize_gradients(model: Model, *args: Any, **kwargs: Any) -> None:
    """megatron-core's reductions over data-parallel ranks, sequence slices and tied weights, then ours over images."""
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        unwrap(chunk).finalize_vision_gradients()


def build_optimizer(
    config: MM1Config,
    model: Model,
    *,
    pg_collection: ProcessGroupCollection,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW or AdaFactor with a learning rate per component, and linear warm-up followed by a cosine.

    Norms and biases (one-dimensional parameters) are not decayed, as in Megatron.
    """
    settings, training = config.optimizer, config.training
    megatron_config = MegatronOptimizerConfig(
        # megatron-core has no AdaFactor: what it wraps around plain gradient descent is wrapped around it.
        optimizer="adam" if settings.optimizer == "adamw" else "sgd",
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=training.precision == "bf16",
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        fp8_recipe=unwrap(model[0]).config.fp8_recipe if config.fp8.fp8_param else None,
    )
    overrides = get_standard_config_overrides(megatron_config) | _component_overrides(config)
    optimizer = get_megatron_optimizer(
        megatron_config, model, overrides, use_gloo_process_groups=False, pg_collection=pg_collection
    )
    for part in optimizer_parts(optimizer):
        if settings.optimizer == "adafactor":
            _put_adafactor_into(part, settings)
        elif isinstance(part.optimizer, torch.optim.AdamW):  # where Transformer Engine's is absent
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one pass over memory; megatron-core has no setting for it
    # The scheduler counts sequences, so that it need not change with the batch size.
    sequences = BatchSizes.of(training).sequences_before
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=sequences(settings.lr_warmup_iters),
        lr_decay_steps=sequences(settings.lr_decay_iters or training.train_iters),
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=sequences(training.train_iters),
        wd_incr_style="constant",
        # Whether a checkpoint's schedule may be another is decided before it is loaded (resume.py).
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _put_adafactor_into(part: MegatronOptimizer, settings: OptimizerConfig) -> None:
    groups = part.optimizer.param_groups
    is_expert = any(group["is_expert_parallel"] for group in groups)
    part.optimizer = AdaFactor(
        groups,
        tp_group=part.expert_tp_group if is_expert else part.tp_group,
        decay_rate=settings.adafactor_decay_rate,
        eps=settings.adafactor_eps,
        clip_threshold=settings.adafactor_clip_threshold,
    )
    part.init_state_fn = lambda optimizer, config: optimizer.fill_state()


def peak_learning_rates(config: MM1Config) -> dict[str, float]:
    """By component."""
    settings = config.optimizer
    own = {"tower": settings.vision_lr, "connector": settings.connector_lr, "decoder": None}
    return {component: settings.lr if lr is None else lr for component, lr in own.items()}


def _component_overrides(config: MM1Config) -> dict[ParamKey, Any]:
    """What sets a component's parameter groups apart: its learning rate, and its name where it is frozen at first."""
    overrides: dict[ParamKey, Any] = {}
    for component, lr in peak_learning_rates(config).items():
        override: dict[str, Any] = {}
        if lr != config.optimizer.lr:
            override |= {"max_lr": lr, "min_lr": lr * config.optimizer.min_lr_ratio}
        if component in config.training.frozen_steps:
            override |= {"component": component}
        if override:
            overrides[ParamKey(name=f"*module.{COMPONENTS[component]}*")] = override
    return overrides


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters that megatron-core chains, or the only one."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def component_learning_rates(config: MM1Config, optimizer: MegatronOptimizer) -> dict[str, float]:
    """The learning rate in force for each component that is trained.

    Every rank has every parameter group (megatron-core aligns them), so this is the same on all ranks.
    """
    peaks = peak_learning_rates(config)
    rates = {}
    for component in set(COMPONENTS) - set(config.training.freeze):
        name = component if component in config.training.frozen_steps else None
        rates[component] = next(
            float(group["lr"])
            for group in optimizer.param_groups
            if (group["max_lr"], group.get("component")) == (peaks[component], name)
        )
    return rates
