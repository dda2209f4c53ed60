"""Which layouts to compare: every legal one, or few that cover every legal pair of sizes; and special cases."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mm1.config import MM1Config, ParallelConfig
from megatron_mm1.config.command_line import set_override
from megatron_mm1.config.derived import block_pattern
from megatron_mm1.config.serialization import from_dict, to_dict
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError, UserError

SIZES = {
    "TP": "tensor_model_parallel_size",
    "SP": "sequence_parallel",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "vision": "vision_parallel_mode",
    "optimizer": "use_distributed_optimizer",
}
"""Dimensions of a layout but the data-parallel size, which is what is left, and their keys under `parallel`."""

MICROBATCHES = 2
"""Microbatches on each rank; virtual stages take more where there are more pipeline ranks."""


@dataclass(frozen=True)
class Layout:
    """A layout to compare with one process.

    Attributes:
        name: as `TP2+SP PP2 DP2`.
        world_size: processes.
        parallel: the sizes.
        options: other settings by dotted key. Those that change what is computed, such as `training.freeze`, hold for
            the reference as well.
    """

    name: str
    world_size: int
    parallel: ParallelConfig
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_parallel_size(self) -> int:
        sizes = self.parallel
        return self.world_size // (
            sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
        )

    @property
    def num_microbatches(self) -> int:
        """Of the global batch."""
        per_rank = MICROBATCHES
        if self.parallel.virtual_pipeline_model_parallel_size > 1:
            # More than the warm-up takes, so that forward and backward messages cross.
            per_rank = max(per_rank, 2 * self.parallel.pipeline_model_parallel_size)
        return per_rank * self.data_parallel_size

    def configure(self, config: MM1Config) -> MM1Config:
        """`config` in this layout, with a global batch of `num_microbatches`."""
        size = config.training.micro_batch_size * self.num_microbatches
        values = to_dict(replace(config, parallel=self.parallel))
        for key, value in {
            "training.global_batch_size": size,
            "training.batch_size_ramp": [],
            "training.frozen_steps": {},
            "training.eval_interval": 0,
            **self.options,
        }.items():
            set_override(values, key, value)
        return from_dict(values)

    def reference(self, config: MM1Config) -> MM1Config:
        """The same model and batch in one process; recomputation and dispatch are layout, not model."""
        configured = self.configure(config)
        training = replace(configured.training, recompute_granularity=None, vision_recompute=False)
        moe = configured.model.moe and replace(configured.model.moe, moe_token_dispatcher_type="alltoall")
        return replace(
            configured,
            parallel=ParallelConfig(),
            training=training,
            model=replace(configured.model, moe=moe),
        )

    def values(self) -> dict[str, Any]:
        """What is at each dimension, the data-parallel size included."""
        return {name: getattr(self.parallel, key) for name, key in SIZES.items()} | {"DP": self.data_parallel_size}


def legal_layouts(config: MM1Config, *, max_world_size: int) -> list[Layout]:
    """Every legal layout of at most this many processes; the smallest first, one process not among them."""
    counts = range(1, max_world_size + 1)
    choices: dict[str, list[Any]] = {name: list(counts) for name in ("TP", "PP", "VPP", "CP")}
    choices |= {"SP": [False, True], "vision": ["tensor", "data"], "optimizer": [False, True]}
    choices |= {name: list(counts) if config.model.moe else [1] for name in ("EP", "ETP")}
    layouts = []
    for values in itertools.product(*(choices[name] for name in SIZES)):
        sizes = dict(zip(SIZES, values, strict=True))
        if sizes["TP"] * sizes["PP"] * sizes["CP"] > max_world_size or _is_idle(sizes):
            continue
        for world_size in range(2, max_world_size + 1):
            layout = make_layout(sizes, world_size=world_size)
            if layout is not None and _is_legal(config, layout):
                layouts.append(layout)
    return sorted(layouts, key=lambda layout: layout.world_size)


def make_layout(sizes: Mapping[str, Any], *, world_size: int) -> Layout | None:
    """The layout with these values of SIZES; None where they do not fit the world size or change nothing."""
    model_parallel = sizes["TP"] * sizes["PP"] * sizes["CP"]
    if world_size % model_parallel or (world_size // model_parallel == 1 and sizes["optimizer"] and sizes["CP"] == 1):
        return None
    parallel = ParallelConfig(**{key: sizes[name] for name, key in SIZES.items()})
    return Layout(_name(sizes, world_size // model_parallel), world_size, parallel)


def _is_idle(sizes: Mapping[str, Any]) -> bool:
    """Whether a setting has nothing to act on, so that another layout is the same."""
    return (
        (sizes["SP"] and sizes["TP"] == 1)
        or (sizes["VPP"] > 1 and sizes["PP"] == 1)
        or (sizes["vision"] == "data" and sizes["TP"] * sizes["CP"] == 1)
    )


def _is_legal(config: MM1Config, layout: Layout) -> bool:
    """Legal also for the configuration's own global batch, of which the comparison takes a part."""
    trial = layout.configure(config) if layout.options else replace(config, parallel=layout.parallel)
    training = replace(
        trial.training,
        global_batch_size=config.training.global_batch_size,
        batch_size_ramp=(),
        frozen_steps={},
        eval_interval=0,
    )
    try:
        validate(replace(trial, training=training), world_size=layout.world_size)
    except ConfigError:
        return False
    return True


def _name(sizes: Mapping[str, Any], data_parallel: int) -> str:
    parts = [f"TP{sizes['TP']}{'+SP' if sizes['SP'] else ''}"] if sizes["TP"] > 1 else []
    parts += [f"{name}{sizes[name]}" for name in ("PP", "VPP", "CP", "EP", "ETP") if sizes[name] > 1]
    parts += [f"DP{data_parallel}"] if data_parallel > 1 else []
    parts += ["images shared"] if sizes["vision"] == "data" else []
    parts += ["distributed optimizer"] if sizes["optimizer"] else []
    return " ".join(parts)


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(layout: Layout) -> set[Pair]:
    """Every two dimensions of a layout with their values."""
    return set(itertools.combinations(sorted(layout.values().items()), 2))


def covering_layouts(layouts: Sequence[Layout]) -> list[Layout]:
    """A few of `layouts` with every pair of values that one of them has: greedily the one that adds most, and of those
    the one with the most processes. Experts whose matrices are split are left to the special cases."""
    candidates = [(layout, pairs(layout)) for layout in layouts if layout.parallel.expert_tensor_parallel_size == 1]
    uncovered = set().union(*(covered for _, covered in candidates))
    chosen = []
    while uncovered:
        best, covered = max(candidates, key=lambda candidate: (len(candidate[1] & uncovered), candidate[0].world_size))
        uncovered -= covered
        chosen.append(best)
    return sorted(chosen, key=lambda layout: layout.world_size)


TP, PP, CP, EP, ETP = (SIZES[name] for name in ("TP", "PP", "CP", "EP", "ETP"))
_TP_SP = {TP: 2, SIZES["SP"]: True}
_SPECIAL: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "PP2, frozen decoder": (2, {PP: 2}, {"training.freeze": ["decoder"]}),
    "PP2, frozen tower": (2, {PP: 2}, {"training.freeze": ["tower"]}),
    "TP2+SP images shared, frozen tower and connector": (
        2,
        {**_TP_SP, SIZES["vision"]: "data"},
        {"training.freeze": ["tower", "connector"]},
    ),
    "CP2 images shared, frozen decoder": (2, {CP: 2, SIZES["vision"]: "data"}, {"training.freeze": ["decoder"]}),
    "DP2 distributed optimizer, frozen connector": (
        2,
        {SIZES["optimizer"]: True},
        {"training.freeze": ["connector"]},
    ),
    "PP3, first stage encodes only": (3, {PP: 3, "decoder_first_pipeline_num_layers": 0}, {}),
    "PP2, layers by pattern": (2, {PP: 2}, {"parallel.hybrid_layer_pattern": "cut after the first layer"}),
    "PP2, tied output": (2, {PP: 2}, {"model.decoder.untie_embeddings_and_output_weights": False}),
    "PP2 VPP2, tied output": (
        2,
        {PP: 2, SIZES["VPP"]: 2},
        {"model.decoder.untie_embeddings_and_output_weights": False},
    ),
    "TP2+SP, full recomputation": (2, _TP_SP, {"training.recompute_granularity": "full"}),
    "PP2 CP2, selective recomputation": (
        4,
        {PP: 2, CP: 2},
        {"training.recompute_granularity": "selective", "training.recompute_modules": ["core_attn", "mlp"]},
    ),
    "TP2+SP images shared, tower recomputed": (
        2,
        {**_TP_SP, SIZES["vision"]: "data"},
        {"training.vision_recompute": True},
    ),
    "DP2, gradients reduced meanwhile": (2, {"overlap_grad_reduce": True}, {}),
    "PP2 VPP2 DP2, gradients reduced meanwhile": (
        4,
        {PP: 2, SIZES["VPP"]: 2, "overlap_grad_reduce": True},
        {},
    ),
}
_SPECIAL_MOE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2+SP EP2, all-gather": (2, {**_TP_SP, EP: 2}, {"model.moe.moe_token_dispatcher_type": "allgather"}),
    "DP2 EP2, all-gather": (2, {EP: 2}, {"model.moe.moe_token_dispatcher_type": "allgather"}),
    "TP2+SP, split experts": (2, {**_TP_SP, ETP: 2}, {}),
    "PP2 CP2 EP2 ETP2 DP2, split experts": (8, {PP: 2, CP: 2, EP: 2, ETP: 2, SIZES["optimizer"]: True}, {}),
    "TP2+SP ETP2, all-gather": (2, {**_TP_SP, ETP: 2}, {"model.moe.moe_token_dispatcher_type": "allgather"}),
    "CP2 EP2, expert bias": (
        2,
        {CP: 2, EP: 2},
        {"model.moe.moe_router_score_function": "sigmoid", "model.moe.moe_router_enable_expert_bias": True},
    ),
    # Without sequence or context parallelism a rank has whole microbatches, and drops what one process would.
    "DP2 EP2, capacity 0.6": (2, {EP: 2}, {"model.moe.moe_expert_capacity_factor": 0.6}),
    "PP2 EP2, full recomputation": (4, {PP: 2, EP: 2}, {"training.recompute_granularity": "full"}),
    "DP2 EP2, experts recomputed": (
        2,
        {EP: 2},
        {"training.recompute_granularity": "selective", "training.recompute_modules": ["moe"]},
    ),
    "PP2 EP2, frozen decoder": (4, {PP: 2, EP: 2}, {"training.freeze": ["decoder"]}),
}


def special_layouts(config: MM1Config, *, max_world_size: int) -> Iterator[Layout]:
    """Freezing, recomputation, stages by hand, tied weights for a dense model; dispatch and dropping for experts."""
    special = _SPECIAL_MOE if config.model.moe else _SPECIAL
    for name, (world_size, sizes, options) in special.items():
        options = dict(options)
        if "parallel.hybrid_layer_pattern" in options:
            layers = block_pattern(config.model)
            options["parallel.hybrid_layer_pattern"] = f"{layers[:1]}|{layers[1:]}"
        layout = Layout(name, world_size, ParallelConfig(**sizes), options)
        if world_size <= max_world_size and _is_legal(config, layout):
            yield layout


def choose_layouts(config: MM1Config, choice: str, *, max_world_size: int) -> list[Layout]:
    """The layouts that a command line means.

    Args:
        choice: "all"; "pairs", which cover every legal pair of sizes; or names, separated by commas.

    Raises:
        UserError: a name is not that of a legal layout, or there is none.
    """
    legal = legal_layouts(config, max_world_size=max_world_size)
    special = list(special_layouts(config, max_world_size=max_world_size))
    if choice in ("all", "pairs"):
        chosen = legal if choice == "all" else covering_layouts(legal)
        if not chosen:
            raise UserError(f"no layout of {max_world_size} processes is legal for this model: raise --world-size")
        return chosen + special
    by_name = {layout.name.replace(",", ""): layout for layout in [*legal, *special]}
    names = [name.strip() for name in choice.split(",")]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(
            f"no legal layout {', '.join(map(repr, unknown))} of at most {max_world_size} processes: use all, pairs or "
            f"names (without commas) as {', '.join(list(by_name)[:8])}, .."
        )
    return [by_name[name] for name in names]
