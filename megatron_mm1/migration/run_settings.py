"""Options that decide data, schedule, layout and start of a run."""

import math

from megatron_mm1.migration.theirs import Migration, Theirs

_RECOMPUTED = ("core_attn", "mlp", "moe")


def lengths(theirs: Theirs, migration: Migration) -> None:
    lengths = [theirs.whole(f"{name}-seq-length") or 0 for name in ("decoder", "dataloader", "packing")]
    length, buffer = max(lengths), theirs.whole("packing-buffer-size") or 0
    if length:
        migration.set("data.seq_length", length)
        images = max(1, (length - 2) // _tokens_per_image(migration))
        migration.set("data.max_images_per_sequence", max(min(16, images), _images_of_one(migration)))
    migration.set("data.packing", "mixed")
    migration.set("data.mixture_unit", "examples")
    if buffer:
        migration.set("data.packing_lookahead", buffer)
        migration.different.append(
            f"--packing-buffer-size {buffer}: data.packing_lookahead is how many sequences are kept open, not how many "
            "examples are chosen from"
        )
    else:
        migration.different.append(
            "training.global_batch_size: a sequence holds one sample there, and as many examples as fit it here: for "
            "as many examples a step divide it by the mean number in a sequence (mm1 data inspect)"
        )
    if (tokenizer := theirs.text("tokenizer-model")) is not None:
        is_file = tokenizer.endswith((".json", ".model"))
        migration.set("data.tokenizer", tokenizer if is_file else f"{tokenizer}/tokenizer.json")
        if not is_file:
            migration.different.append(f"--tokenizer-model {tokenizer}: data.tokenizer is a file: download it there")
    if theirs.has("data-path"):
        migration.unmapped.append(
            f"--data-path {' '.join(theirs.options['data-path'])}: prepare each of its data sets (mm1 data prepare "
            "reads energon's) and list the folders, with the blend's weights, in data.sources and data.validation"
        )


def _tokens_per_image(migration: Migration) -> int:
    model = migration.values["model"]
    return int(model.get("connector", {}).get("tokens_per_image", 144))


def _images_of_one(migration: Migration) -> int:
    """The most tiles that one image becomes, with the whole."""
    return 1 + int(migration.values.get("data", {}).get("max_image_tiles", 0))


def schedule(theirs: Theirs, migration: Migration) -> None:
    batch = theirs.whole("global-batch-size") or (theirs.whole("micro-batch-size") or 1)
    migration.set("training.global_batch_size", batch)
    if not theirs.has("global-batch-size"):
        migration.different.append(
            f"training.global_batch_size {batch}: without --global-batch-size it is the micro batch size times the "
            "data-parallel size, which the script does not say"
        )
    steps = _steps(theirs, "train", batch)
    if steps is not None:
        migration.set("training.train_iters", steps)
    decay = _steps(theirs, "lr-decay", batch)
    if decay is not None and decay != steps:
        migration.set("optimizer.lr_decay_iters", decay)
    warmup, share = _steps(theirs, "lr-warmup", batch), theirs.number("lr-warmup-fraction")
    if share is not None:
        warmup = int(share * (decay or steps or 0))
    migration.set("optimizer.lr_warmup_iters", warmup or 0)
    style, peak, least = theirs.text("lr-decay-style"), theirs.number("lr"), theirs.number("min-lr") or 0.0
    if style not in ("cosine", "constant"):
        default = "" if "lr-decay-style" in theirs.given else " (Megatron-LM's default)"
        migration.unmapped.append(f"--lr-decay-style {style}{default}: the rate falls along a cosine")
    if peak:
        migration.set("optimizer.min_lr_ratio", 1.0 if style == "constant" else float(f"{least / peak:.12g}"))
    parts = {"freeze-LM": "decoder", "freeze-ViT": "tower"}
    migration.set("training.freeze", [part for name, part in parts.items() if theirs.has(name)])


def _steps(theirs: Theirs, what: str, batch: int) -> int | None:
    """A stretch of training in steps, from the option that counts them or the one that counts samples."""
    if (steps := theirs.whole(f"{what}-iters")) is not None:
        return steps
    samples = theirs.whole(f"{what}-samples")
    return None if samples is None else math.floor(samples / batch)


def layout(theirs: Theirs, migration: Migration) -> None:
    migration.set("training.layer_backend", "transformer_engine" if theirs.has("use-te") else "local")
    migration.set("training.precision", "bf16" if theirs.has("bf16") or theirs.has("fp16") else "fp32")
    if theirs.has("fp16"):
        migration.unmapped.append("--fp16: training.precision is bf16 instead, the other 16-bit type")
    if theirs.has("fp8-format"):
        _fp8(theirs, migration)
    if per_stage := theirs.whole("num-layers-per-virtual-pipeline-stage"):
        layers, ranks = theirs.whole("num-layers") or 0, theirs.whole("pipeline-model-parallel-size") or 1
        migration.set("parallel.virtual_pipeline_model_parallel_size", max(1, layers // ranks // per_stage))
    _recomputation(theirs, migration)


def _fp8(theirs: Theirs, migration: Migration) -> None:
    recipe = theirs.text("fp8-recipe") or "delayed"
    if recipe not in ("delayed", "tensorwise", "blockwise"):
        migration.unmapped.append(f"--fp8-recipe {recipe}: there is delayed, tensorwise and blockwise; bf16 is taken")
        return
    for component in ("decoder", "tower", "connector"):
        migration.set(f"fp8.{component}_recipe", f"fp8_{recipe}")
    fixed = "e4m3" if recipe == "blockwise" else "hybrid"
    if (numbers := theirs.text("fp8-format")) != fixed:
        migration.different.append(f"--fp8-format {numbers}: fp8_{recipe} is {fixed} here")


def _recomputation(theirs: Theirs, migration: Migration) -> None:
    if theirs.has("recompute-activations"):
        migration.set("training.recompute_granularity", "selective")
    if (layers := theirs.whole("recompute-num-layers")) is not None:
        migration.set("training.recompute_num_layers", 2 * layers)
    if theirs.has("recompute-modules"):
        modules = theirs.options["recompute-modules"]
        migration.set("training.recompute_modules", [module for module in modules if module in _RECOMPUTED])
        if other := [module for module in modules if module not in _RECOMPUTED]:
            migration.unmapped.append(f"--recompute-modules {' '.join(other)}: {', '.join(_RECOMPUTED)} only")
    if theirs.has("recompute-vision"):
        whole = theirs.has("recompute-granularity") and theirs.has("recompute-method")
        migration.set("training.vision_recompute", whole)
        if not whole:
            migration.unmapped.append(
                "--recompute-vision: without --recompute-granularity and --recompute-method it does nothing there"
            )


def start(theirs: Theirs, migration: Migration) -> None:
    """Where weights come from: theirs are read by `mm1 convert import`, never by training."""
    for name in ("pretrained-checkpoint", "load"):
        path = theirs.text(name)
        if path and path != theirs.text("save"):
            migration.unmapped.append(
                f"--{name} {path}: convert it (mm1 convert import --source {path} --output start), then set "
                "checkpoint.load start and checkpoint.finetune true"
            )
    if theirs.has("finetune"):
        migration.unmapped.append("--finetune: set checkpoint.finetune true together with checkpoint.load")
