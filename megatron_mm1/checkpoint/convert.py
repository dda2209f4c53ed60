"""`mm1 convert`: each conversion makes a plan, which is then shown (`--dry-run`) or carried out."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mm1 import __version__
from megatron_mm1.checkpoint.dist_checkpoint import COMMON_STATE
from megatron_mm1.checkpoint.format import FORMAT_VERSION, OPTIMIZER_PREFIX, CheckpointMetadata
from megatron_mm1.checkpoint.merge import merge_adapters
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint, write_mm1
from megatron_mm1.checkpoint.safetensors_folder import GB, IMAGE_PROCESSOR, write_safetensors
from megatron_mm1.checkpoint.summary import in_bytes, plan_table
from megatron_mm1.checkpoint.tensors import Plan, PlanSource, Subset, copied, in_pieces
from megatron_mm1.checkpoint.vocabulary import with_vocabulary
from megatron_mm1.checkpoint.weights import Weights, component_of, components, open_weights, with_component
from megatron_mm1.config import DataConfig, MM1Config, ModelConfig
from megatron_mm1.config.command_line import parse_arguments, set_override
from megatron_mm1.config.derived import COMPONENTS, smallest_world_size
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.serialization import from_dict, to_dict, to_yaml
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_mm1.data.tokenizer import Tokenizer

TRANSFORMERS = "transformers"
_WEIGHTS = tuple(COMPONENTS.values())


def import_main(args: Namespace, config_arguments: Sequence[str]) -> None:
    """Weights from elsewhere, of one or several parts of the model, as a checkpoint to start training from."""
    from megatron_mm1.checkpoint.model_check import model_problems

    config = load_config(config_arguments)
    model = config.model
    origin: dict[str, Path] = {}
    plan: Plan = []
    stated: dict[str, Any] = {}
    for path in args.source:
        weights = open_weights(path, base=model, seq_length=config.data.seq_length, with_images=True)
        if weights.checkpoint is not None:
            raise UserError(f"{path} is an MM1 checkpoint already: take its parts with mm1 convert replace or take")
        for component in weights.components:
            if component in origin:
                raise UserError(f"both {origin[component]} and {path} hold a {component}: name one of them")
            origin[component] = path
        model = weights.model
        stated |= weights.data_settings
        plan += weights.source.plan if isinstance(weights.source, PlanSource) else weights.plan("")
    if problems := model_problems(model):
        raise ConfigError(problems)
    of_images = [name for name in stated if name != "tokenizer"]
    model, stated = _outranked(config_arguments, config, model, stated)
    if args.tokenizer is not None:
        stated["tokenizer"] = str(args.tokenizer)
    config = from_dict(to_dict(replace(config, data=replace(config.data, **stated))))
    data = DataConfig(**{name: getattr(config.data, name) for name in of_images})
    if of_images and (problems := model_problems(model, data)):
        raise ConfigError(problems)
    fingerprint = ""
    if "tokenizer" in stated:
        tokenizer = _open_tokenizer(Path(config.data.tokenizer))
        fingerprint, before = tokenizer.fingerprint, model.decoder.vocab_size
        model, plan = with_vocabulary(model, plan, vocab_size=tokenizer.vocab_size)
        if before < model.decoder.vocab_size:
            rows = model.decoder.vocab_size
            print(f"the vocabulary grows from {before} to {rows} rows: {config.data.tokenizer} needs them")
    config = replace(config, model=model)
    metadata = CheckpointMetadata(
        iteration=0,
        consumed_sequences=0,
        config=to_dict(config),
        tokenizer_fingerprint=fingerprint,
        plan_fingerprint="",
        components=components(PlanSource(plan)),
        has_training_state=False,
    )
    _write(args, plan, metadata)


def _outranked(
    config_arguments: Sequence[str], config: MM1Config, model: ModelConfig, stated: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """`model` and what folders state of data, where options say nothing else of images and data."""
    _, said = parse_arguments(config_arguments)
    images = ("image_resize", "image_mean", "image_std")
    of_options = {name: getattr(config.model.vision, name) for name in images if f"model.vision.{name}" in said}
    kept = {name: value for name, value in stated.items() if f"data.{name}" not in said}
    if kept.get("tile_indicators") and config.data.image_tiling == "none" and "image_tiling" not in kept:
        kept["tile_indicators"] = False  # of the folder's tiles, which the options leave out
    return replace(model, vision=replace(model.vision, **of_options)), kept


def export_main(args: Namespace) -> None:
    """A checkpoint's weights, or some parts of them, as another library's folder."""
    from megatron_mm1.data.chat import Chat

    checkpoint = MM1Checkpoint(args.checkpoint)
    config = checkpoint.metadata.mm1_config()
    model, merged = merge_adapters(config.model, checkpoint)
    config, source = replace(config, model=model), PlanSource(merged)
    if args.tokenizer is not None:
        config = replace(config, data=replace(config.data, tokenizer=str(args.tokenizer)))
    extra_files: Mapping[str, bytes | str] = {}
    names = {}
    if args.family == TRANSFORMERS:
        from megatron_mm1.checkpoint.transformers_export import export_transformers

        _check_tokenizer(checkpoint.metadata, Path(config.data.tokenizer))
        theirs, plan, extra_files = export_transformers(config, source, chat=Chat.of(args))
    else:
        from megatron_mm1.checkpoint.families import FAMILIES, WITH_IMAGE_PROCESSOR, export_model
        from megatron_mm1.checkpoint.image_processors import export_image_processor

        if Chat.of(args) is not None:
            raise UserError(f"--chat and --chat-template are for --family {TRANSFORMERS} only, not for {args.family}")
        if args.family not in FAMILIES:
            raise UserError(f"unknown family {args.family!r}: use one of {', '.join([*FAMILIES, TRANSFORMERS])}")
        theirs, plan = export_model(
            args.family,
            config.model,
            source,
            seq_length=config.data.seq_length,
            image_token_id=_image_token_id(config) if args.image_token_id is None else args.image_token_id,
        )
        if args.family in WITH_IMAGE_PROCESSOR:
            extra_files = {IMAGE_PROCESSOR: json.dumps(export_image_processor(config.model.vision), indent=2) + "\n"}
        if args.family == "open_clip":
            names = {"stem": "open_clip_model", "config_name": "open_clip_config.json"}
    if args.dry_run:
        print(plan_table(plan))
        return
    write_safetensors(
        args.output,
        plan,
        config=theirs,
        extra_files=extra_files,
        max_shard_bytes=int(args.max_shard_gb * GB),
        overwrite=args.overwrite,
        before_commit=checkpoint.verify,
        **names,
    )
    _print_result(args.output, plan)


def reshard_main(args: Namespace, config_arguments: Sequence[str]) -> None:
    """A checkpoint under another layout, with its training state; the numbers are the same."""
    checkpoint = MM1Checkpoint(args.checkpoint)
    config = _with_options(checkpoint.metadata.mm1_config(), config_arguments, group="parallel")
    validate(config, world_size=smallest_world_size(config.parallel))
    names = [name for name in checkpoint.tensors if name.startswith(_kept(checkpoint.metadata))]
    plan = [in_pieces(checkpoint, name, num_pieces=args.pieces) for name in names]
    _write(args, plan, _updated(checkpoint.metadata, config), checkpoint, objects=_objects(checkpoint, _WEIGHTS))


def upcycle_main(args: Namespace, config_arguments: Sequence[str]) -> None:
    """A dense checkpoint's weights with experts in place of feed-forward layers."""
    from megatron_mm1.checkpoint.upcycle import upcycle

    checkpoint = _without_adapters(MM1Checkpoint(args.checkpoint))
    before = checkpoint.metadata.mm1_config()
    moe = _with_options(before, config_arguments, group="model.moe").model.moe
    if moe is None:
        raise UserError("nothing says which experts the model is to have: use --num-moe-experts N --moe-layer-freq K")
    model, plan = upcycle(before.model, moe, Subset(checkpoint, _WEIGHTS), seed=args.router_seed)
    _write(args, plan, _weights_only(checkpoint.metadata, replace(before, model=model)), checkpoint)


def resize_main(args: Namespace) -> None:
    """A checkpoint's weights for images of another size."""
    from megatron_mm1.checkpoint.resize import resize

    checkpoint = _without_adapters(MM1Checkpoint(args.checkpoint))
    before = checkpoint.metadata.mm1_config()
    model, plan = resize(before.model, args.image_size, Subset(checkpoint, _WEIGHTS))
    metadata = _weights_only(checkpoint.metadata, replace(before, model=model))
    _write(args, plan, metadata, checkpoint, objects=checkpoint.read_objects(_WEIGHTS))


def merge_main(args: Namespace) -> None:
    """A checkpoint's adapters in its weights."""
    checkpoint = MM1Checkpoint(args.checkpoint)
    before = checkpoint.metadata.mm1_config()
    if before.model.lora is None:
        raise UserError(f"{checkpoint.path} has no adapters to merge: it is used as it is")
    model, plan = merge_adapters(before.model, checkpoint)
    metadata = _weights_only(checkpoint.metadata, replace(before, model=model))
    _write(args, plan, metadata, checkpoint, objects=checkpoint.read_objects(_WEIGHTS))


def take_main(args: Namespace) -> None:
    """One part of a checkpoint's model, as a checkpoint of its own."""
    checkpoint = _without_adapters(MM1Checkpoint(args.checkpoint))
    prefix = COMPONENTS[args.component]
    plan = [copied(checkpoint, name) for name in checkpoint.tensors if name.startswith(prefix)]
    if not plan:
        raise UserError(f"{checkpoint.path} has no {args.component}")
    metadata = _weights_only(checkpoint.metadata, checkpoint.metadata.mm1_config(), components=(args.component,))
    _write(args, plan, metadata, checkpoint, objects=checkpoint.read_objects((prefix,)))


def replace_main(args: Namespace) -> None:
    """A checkpoint with one part of the model from another one, or from another library's folder.

    The training state stays as long as it is whole: if the replaced part is trained, the other checkpoint has to have
    optimizer state for it.
    """
    from megatron_mm1.checkpoint.model_check import model_problems

    base = _without_adapters(MM1Checkpoint(args.checkpoint))
    before = base.metadata.mm1_config()
    images = args.component == "tower"
    other = open_weights(args.source, base=before.model, seq_length=before.data.seq_length, with_images=images)
    if other.checkpoint is not None:
        _without_adapters(other.checkpoint)
    if args.component not in other.components:
        raise UserError(f"{args.source} has no {args.component}: it holds {', '.join(other.components) or 'nothing'}")
    model = with_component(before.model, other.model, args.component)
    if problems := model_problems(model):
        raise ConfigError(problems)
    config = replace(before, model=model)
    changes: dict[str, Any] = {}
    if args.component == "decoder":
        config, changes = _decoders_tokenizer(config, other)
    plan = [copied(base, name) for name in base.tensors if component_of(name) != args.component]
    plan += [copied(other.source, name) for name in other.source.tensors if component_of(name) == args.component]
    present = tuple(part for part in COMPONENTS if part == args.component or part in base.metadata.components)
    if _keeps_training_state(base, other, args.component):
        metadata = _updated(base.metadata, config, components=present, **changes)
    else:
        if base.metadata.has_training_state:
            print(f"only weights are kept: {args.source} has no optimizer state for the {args.component}")
        metadata = _weights_only(base.metadata, config, components=present, **changes)
    plan = [planned for planned in plan if planned.name.startswith(_kept(metadata))]
    others = tuple(prefix for component, prefix in COMPONENTS.items() if component != args.component)
    objects = _objects(base, others) if metadata.has_training_state else base.read_objects(others)
    if other.checkpoint is not None:
        objects |= other.checkpoint.read_objects((COMPONENTS[args.component],))
    sources = [base] if other.checkpoint is None else [base, other.checkpoint]
    _write(args, plan, metadata, *sources, objects=objects)


def _without_adapters(checkpoint: MM1Checkpoint) -> MM1Checkpoint:
    """The checkpoint, refused where parts of a layer would be left behind."""
    if checkpoint.metadata.mm1_config().model.lora is not None:
        raise UserError(f"{checkpoint.path} has adapters beside its weights: merge them first, with mm1 convert merge")
    return checkpoint


def _keeps_training_state(base: MM1Checkpoint, other: Weights, component: str) -> bool:
    if OPTIMIZER_PREFIX not in _kept(base.metadata):
        return False
    wanted, there = (_optimizer_kinds(source, component) for source in (base, other.source))
    return not wanted or wanted == there


def _optimizer_kinds(source: Any, component: str) -> set[str]:
    """exp_avg, exp_avg_sq, ..: what the optimizer keeps of this part."""
    return {
        name.removeprefix(OPTIMIZER_PREFIX).partition(".")[0]
        for name in source.tensors
        if name.startswith(OPTIMIZER_PREFIX) and component_of(name) == component
    }


def _decoders_tokenizer(config: MM1Config, other: Weights) -> tuple[MM1Config, dict[str, Any]]:
    """A decoder brings its tokenizer along, where it has one that is known."""
    if other.checkpoint is None:
        return config, {"tokenizer_fingerprint": ""}
    metadata = other.checkpoint.metadata
    data = replace(config.data, tokenizer=metadata.mm1_config().data.tokenizer)
    return replace(config, data=data), {"tokenizer_fingerprint": metadata.tokenizer_fingerprint}


def _kept(metadata: CheckpointMetadata) -> tuple[str, ...]:
    """What the names of the tensors begin with that another checkpoint can go on with.

    Before format 2 the optimizer's state has names that depend on the layout: it is left behind.
    """
    has_state = metadata.has_training_state and metadata.format_version >= 2
    return (*_WEIGHTS, OPTIMIZER_PREFIX) if has_state else _WEIGHTS


def _objects(checkpoint: MM1Checkpoint, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    """Common state (step counts, schedule) and modules' extra state; random states belong to a layout and stay."""
    has_state = OPTIMIZER_PREFIX in _kept(checkpoint.metadata)
    return checkpoint.read_objects((COMMON_STATE, *prefixes) if has_state else prefixes)


def _updated(metadata: CheckpointMetadata, config: MM1Config, **changes: Any) -> CheckpointMetadata:
    """The same checkpoint in today's format, without ranks whose random state could be looked for."""
    if OPTIMIZER_PREFIX not in _kept(metadata):
        return _weights_only(metadata, config, **changes)
    return replace(
        metadata,
        config=to_dict(config),
        format_version=FORMAT_VERSION,
        code_version=__version__,
        world_size=None,
        **changes,
    )


def _weights_only(metadata: CheckpointMetadata, config: MM1Config, **changes: Any) -> CheckpointMetadata:
    return CheckpointMetadata(
        **{
            "iteration": 0,
            "consumed_sequences": 0,
            "config": to_dict(config),
            "tokenizer_fingerprint": metadata.tokenizer_fingerprint,
            "plan_fingerprint": "",
            "components": metadata.components,
            "has_training_state": False,
            **changes,
        }
    )


def _with_options(config: MM1Config, arguments: Sequence[str], *, group: str) -> MM1Config:
    """A configuration with options of the command line, which may be keys of this group only.

    Where the number of pipeline stages changes, what said how to split the old ones is forgotten.
    """
    fixed, overrides = parse_arguments(arguments)
    named = [name for name, value in vars(fixed).items() if value]
    strange = [f"--{key}" for key in [*named, *overrides] if not key.startswith(f"{group}.")]
    if strange:
        raise ConfigError([f"{', '.join(strange)}: only keys of {group} can be changed here"])
    values = to_dict(config)
    if any("pipeline_model_parallel_size" in path for path in overrides):
        values["parallel"] |= {"decoder_first_pipeline_num_layers": None, "hybrid_layer_pattern": None}
    for path, text in overrides.items():
        set_override(values, path, text)
    return from_dict(values)


def _image_token_id(config: MM1Config) -> int | None:
    """As the run's tokenizer has it; None where that is not at hand."""
    from megatron_mm1.data.tokenizer import open_tokenizer

    return open_tokenizer(config.data.tokenizer).image_id if Path(config.data.tokenizer).is_file() else None


def _check_tokenizer(metadata: CheckpointMetadata, tokenizer: Path) -> None:
    """Refuse to export a tokenizer that the model was not trained with."""
    if not tokenizer.is_file():
        raise UserError(
            f"no tokenizer at {str(tokenizer)!r}: name the one the model was trained with by --tokenizer FILE"
        )
    found, wanted = _open_tokenizer(tokenizer).fingerprint, metadata.tokenizer_fingerprint
    if wanted and found != wanted:
        raise UserError(
            f"{tokenizer} is another tokenizer (SHA-256 {found[:12]}..) than the model was trained with "
            f"({wanted[:12]}..): name that one by --tokenizer FILE"
        )


def _open_tokenizer(path: Path) -> "Tokenizer":
    from megatron_mm1.data.tokenizer import open_tokenizer

    return open_tokenizer(path)


def _write(
    args: Namespace,
    plan: Plan,
    metadata: CheckpointMetadata,
    *sources: MM1Checkpoint,
    objects: Mapping[str, bytes] | None = None,
) -> None:
    """Show the plan or carry it out; what is read from damaged `sources` does not become a checkpoint."""
    if args.dry_run:
        print(plan_table(plan))
        return

    def verify() -> None:
        for source in sources:
            source.verify()

    path = write_mm1(args.output, plan, metadata, objects=objects, overwrite=args.overwrite, before_commit=verify)
    (args.output / "config.yaml").write_text(to_yaml(metadata.mm1_config()))  # for mm1 train --config
    _print_result(path, plan)


def _print_result(path: Path, plan: Plan) -> None:
    size = sum(planned.info.num_bytes for planned in plan)
    print(f"{path}: {len(plan)} tensors, {in_bytes(size)}")
