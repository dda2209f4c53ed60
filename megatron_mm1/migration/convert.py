"""The settings of a launch script of Megatron-LM's multimodal example as those of an MM1 run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_mm1.config.command_line import set_override
from megatron_mm1.config.schema import MM1Config, VisionConfig
from megatron_mm1.config.serialization import from_dict
from megatron_mm1.errors import UserError
from megatron_mm1.migration.models import LANGUAGES, OTHER_LANGUAGES, OTHER_TOWERS, TOWERS
from megatron_mm1.migration.options import ALL, DEFAULTS

_RECOMPUTED = ("core_attn", "mlp", "moe")


@dataclass
class Migration:
    """A run of theirs as one of ours.

    Attributes:
        values: of our configuration, nested, those alone that the script or Megatron-LM's defaults decide.
        unmapped: what has no counterpart, and why.
        different: what has one that is not the same, and how.
    """

    values: dict[str, Any] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        set_override(self.values, key, value)

    def config(self) -> MM1Config:
        """Raises `ConfigError` where the script leaves out what has no default."""
        return from_dict(self.values)


def options_of(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Option without its dashes -> its values; of an option that comes twice the last, as argparse does."""
    options: dict[str, list[str]] = {}
    name = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = [value] if equals else []
        elif name is not None:
            options[name].append(word)
    return options


def migrate(arguments: Sequence[str]) -> Migration:
    """Maps a training program's arguments.

    Raises:
        UserError: an option lacks its value, or a number is none.
    """
    given = options_of(arguments)
    theirs = _Theirs({name: [value] for name, value in DEFAULTS.items()} | given, given)
    migration = Migration()
    migration.set("name", "from-megatron")
    _plain_options(theirs, migration)
    for part in (_decoder, _experts, _vision, _images, _lengths, _schedule, _layout, _start):
        part(theirs, migration)
    return migration


@dataclass(frozen=True)
class _Theirs:
    options: Mapping[str, list[str]]
    given: Mapping[str, list[str]]

    def has(self, name: str) -> bool:
        return name in self.options

    def text(self, name: str) -> str | None:
        """The option's value; None where it is not given and has no default that differs from ours."""
        if name not in self.options:
            return None
        if len(self.options[name]) != 1:
            raise UserError(f"--{name} takes one value, and the script gives it {len(self.options[name])}")
        return self.options[name][0]

    def number(self, name: str) -> float | None:
        text = self.text(name)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise UserError(f"--{name} {text} is no number") from None

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        return None if number is None else int(number)


def _plain_options(theirs: _Theirs, migration: Migration) -> None:
    """Everything that one option decides."""
    for name in theirs.options:
        option = ALL.get(name)
        said = " ".join([f"--{name}", *theirs.options[name]])
        if option is None:
            migration.unmapped.append(f"{said}: not an option that this converter knows")
        elif option.fate == "none":
            migration.unmapped.append(f"{said}: {option.note}")
        elif option.fate == "implied" and option.accepted and theirs.text(name) not in option.accepted:
            default = "" if name in theirs.given else " (Megatron-LM's default)"
            migration.unmapped.append(f"{said}{default}: {option.note}")
        elif option.fate == "key":
            migration.set(option.ours, theirs.text(name))
            if option.note and name in theirs.given:
                migration.different.append(f"{said}: {option.note}")
        elif option.fate == "flag":
            migration.set(option.ours, option.value)


def _decoder(theirs: _Theirs, migration: Migration) -> None:
    kind = theirs.text("language-model-type") or ""
    language = LANGUAGES.get(kind)
    if language is None:
        reason = next((why for start, why in OTHER_LANGUAGES.items() if kind.startswith(start)), "it is not known here")
        migration.unmapped.append(f"--language-model-type {kind}: {reason}; the sizes are the script's own")
    ffn = theirs.whole("ffn-hidden-size") if language is None else language.ffn_hidden_size
    if ffn is not None:
        migration.set("model.decoder.ffn_hidden_size", ffn)
    if language is not None and language.add_qkv_bias:
        migration.set("model.decoder.add_qkv_bias", True)
    if (vocabulary := theirs.whole("vocab-size")) is not None:
        migration.set("model.decoder.vocab_size", vocabulary)
    elif language is not None:
        migration.set("model.decoder.vocab_size", language.vocab_size)
        migration.different.append(
            f"model.decoder.vocab_size {language.vocab_size} is what {kind} was published with: the script leaves it "
            "to the tokenizer, whose size it must at least be"
        )
    if theirs.has("group-query-attention"):
        migration.set("model.decoder.num_query_groups", theirs.whole("num-query-groups") or 1)
    if theirs.has("use-rope-scaling"):
        migration.set("model.decoder.rope_scaling_factor", theirs.number("rope-scaling-factor") or 8.0)
    untied = theirs.has("untie-embeddings-and-output-weights")
    migration.set("model.decoder.untie_embeddings_and_output_weights", untied)
    for name in ("attention-dropout", "hidden-dropout"):
        if theirs.number(name):
            default = "" if name in theirs.given else " (Megatron-LM's default)"
            migration.unmapped.append(f"--{name} {theirs.text(name)}{default}: an MM1 has no dropout")


def _experts(theirs: _Theirs, migration: Migration) -> None:
    if not theirs.has("num-experts"):
        if migration.values.get("model", {}).pop("moe", None):
            migration.unmapped.append("--moe-..: there are no experts without --num-experts")
        return
    frequency = theirs.text("moe-layer-freq") or "1"
    migration.set("model.moe.moe_layer_freq", 1)
    if frequency != "1":
        migration.unmapped.append(
            f"--moe-layer-freq {frequency}: of every N blocks theirs has experts in the first, ours in the last: every "
            "block has experts now, set model.moe.moe_layer_freq"
        )
    for key in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        migration.values["model"]["moe"].setdefault(key, 0.0)


def _vision(theirs: _Theirs, migration: Migration) -> None:
    kind = theirs.text("vision-model-type") or ""
    height, width, patch = (theirs.whole(name) or 0 for name in ("img-h", "img-w", "patch-dim"))
    tower = TOWERS.get(kind)
    if tower is None:
        reason = next((why for start, why in OTHER_TOWERS.items() if kind.startswith(start)), "it is not known here")
        migration.unmapped.append(
            f"--vision-model-type {kind}: {reason}; model.vision and model.connector stay MM1's, ViT-H/14 at 378 px"
        )
        return
    if height != width:
        migration.unmapped.append(f"--img-h {height} --img-w {width}: images are squares; {height} px are taken")
    own = asdict(VisionConfig())
    changed = {name: value for name, value in asdict(tower).items() if value != own[name]}
    epsilon = theirs.number("norm-epsilon")
    if kind == "clip" and epsilon is not None:  # taken over from the decoder's options
        changed["layernorm_epsilon"] = epsilon
    for name, value in {**changed, "image_size": height, "patch_size": patch}.items():
        migration.set(f"model.vision.{name}", list(value) if isinstance(value, tuple) else value)
    if kind == "clip" and not theirs.has("disable-vision-class-token"):
        migration.unmapped.append(
            "without --disable-vision-class-token the class token is an image token; ours never is"
        )
    migration.set("model.connector.connector", "mlp")
    migration.set("model.connector.tokens_per_image", (height // max(1, patch)) ** 2)
    projection, language = theirs.text("vision-projection-type") or "mlp", theirs.text("language-model-type") or ""
    if projection != "mlp":
        migration.unmapped.append(f"--vision-projection-type {projection}: the connector is the mlp one, of two layers")
    elif language in LANGUAGES:
        migration.different.append(
            f"model.connector mlp: two layers with biases, as wide as the decoder; that of {language} differs: "
            f"{LANGUAGES[language].projection}"
        )


def _images(theirs: _Theirs, migration: Migration) -> None:
    tiles = theirs.whole("max-num-tiles") or 1
    if theirs.has("use-tiling") and tiles > 1:
        migration.set("data.image_tiling", "dynamic")
        migration.set("data.max_image_tiles", tiles)
        migration.different.append(
            "--use-tiling: the grid is chosen by MM1.5's rule, for documents of at most two images"
            + ("" if theirs.has("use-thumbnail") else ", and an overview follows, as with --use-thumbnail")
        )
    if theirs.has("image-tag-type") and theirs.text("image-tag-type"):
        migration.unmapped.append(f"--image-tag-type {theirs.text('image-tag-type')}: images are not put between tags")


def _lengths(theirs: _Theirs, migration: Migration) -> None:
    lengths = [theirs.whole(f"{name}-seq-length") or 0 for name in ("decoder", "dataloader", "packing")]
    length, buffer = max(lengths), theirs.whole("packing-buffer-size") or 0
    if length:
        migration.set("data.seq_length", length)
        images = max(1, (length - 2) // _tokens_per_image(migration))
        migration.set("data.max_images_per_sequence", min(16, images))
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


def _schedule(theirs: _Theirs, migration: Migration) -> None:
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


def _steps(theirs: _Theirs, what: str, batch: int) -> int | None:
    """A stretch of training in steps, from the option that counts them or the one that counts samples."""
    if (steps := theirs.whole(f"{what}-iters")) is not None:
        return steps
    samples = theirs.whole(f"{what}-samples")
    return None if samples is None else math.floor(samples / batch)


def _layout(theirs: _Theirs, migration: Migration) -> None:
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


def _fp8(theirs: _Theirs, migration: Migration) -> None:
    recipe = theirs.text("fp8-recipe") or "delayed"
    if recipe not in ("delayed", "tensorwise", "blockwise"):
        migration.unmapped.append(f"--fp8-recipe {recipe}: there is delayed, tensorwise and blockwise; bf16 is taken")
        return
    for component in ("decoder", "tower", "connector"):
        migration.set(f"fp8.{component}_recipe", f"fp8_{recipe}")
    fixed = "e4m3" if recipe == "blockwise" else "hybrid"
    if (numbers := theirs.text("fp8-format")) != fixed:
        migration.different.append(f"--fp8-format {numbers}: fp8_{recipe} is {fixed} here")


def _recomputation(theirs: _Theirs, migration: Migration) -> None:
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


def _start(theirs: _Theirs, migration: Migration) -> None:
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
