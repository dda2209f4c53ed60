"""Options that decide the model."""

from dataclasses import asdict

from megatron_mm1.config.schema import VisionConfig
from megatron_mm1.migration.models import LANGUAGES, OTHER_LANGUAGES, OTHER_TOWERS, TOWERS
from megatron_mm1.migration.theirs import Migration, Theirs


def decoder(theirs: Theirs, migration: Migration) -> None:
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


def experts(theirs: Theirs, migration: Migration) -> None:
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


def vision(theirs: Theirs, migration: Migration) -> None:
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


def images(theirs: Theirs, migration: Migration) -> None:
    tiles = theirs.whole("max-num-tiles") or 1
    if theirs.has("use-tiling") and tiles > 1:
        migration.set("data.image_tiling", "dynamic")
        migration.set("data.max_image_tiles", tiles)
        migration.different.append(
            "--use-tiling: the grid is chosen by MM1.5's rule, for documents of at most two images"
            + ("" if theirs.has("use-thumbnail") else ", and an overview follows, as with --use-thumbnail")
        )
        if theirs.has("use-tile-tags"):
            migration.set("data.tile_indicators", True)
            migration.different.append("--use-tile-tags: (k,i,j), its image, row and column, in front of each tile")
    if theirs.has("image-tag-type") and theirs.text("image-tag-type"):
        migration.unmapped.append(f"--image-tag-type {theirs.text('image-tag-type')}: images are not put between tags")
