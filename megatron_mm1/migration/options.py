"""Every option of Megatron-LM's multimodal example, and what becomes of it.

Taken from `examples/multimodal/multimodal_args.py`, the example's launch scripts, and those of Megatron-LM's common
options that change such a run, at commit d98e8a64 (2026-08-22).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Fate = Literal["key", "flag", "computed", "implied", "none"]
"""Its value is a key's; it sets a key to `value`; keys are computed from it and others; it holds for every MM1 (with
one of `accepted` values); we have nothing of the kind."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One of their options, without its dashes in front.

    Attributes:
        fate: see `Fate`.
        ours: the key, or keys, of our configuration.
        value: what a flag sets the key to.
        accepted: values that are implied; empty: any.
        note: why there is nothing of the kind, how ours differs, or why it is implied.
    """

    fate: Fate
    ours: str = ""
    value: str = "true"
    accepted: tuple[str, ...] = ()
    note: str = ""


def _key(ours: str, note: str = "") -> Option:
    return Option(fate="key", ours=ours, note=note)


def _flag(ours: str, value: str = "true", note: str = "") -> Option:
    return Option(fate="flag", ours=ours, value=value, note=note)


def _computed(ours: str, note: str = "") -> Option:
    return Option(fate="computed", ours=ours, note=note)


def _implied(note: str, *accepted: str) -> Option:
    return Option(fate="implied", note=note, accepted=accepted)


def _none(note: str) -> Option:
    return Option(fate="none", note=note)


_SOUND = "an MM1 has no sound"
_VIDEO = "an MM1 has no video"
_RADIO = "RADIO towers are not among ours"
_RESOLUTION = "images are cut into tiles of one size (data.image_tiling) instead"
_UNREAD = "it is declared there, and no public code at that commit reads it"
_LOGS = "the logs have loss, gradient norm, rates and times only"

OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "Decoder": {
        "language-model-type": _computed(
            "model.decoder.ffn_hidden_size, vocab_size, add_qkv_bias", "those with RMSNorm, SwiGLU and rotary positions"
        ),
        "num-layers": _key("model.decoder.num_layers"),
        "hidden-size": _key("model.decoder.hidden_size"),
        "ffn-hidden-size": _computed("model.decoder.ffn_hidden_size", "the language model type's outranks it"),
        "num-attention-heads": _key("model.decoder.num_attention_heads"),
        "group-query-attention": _computed("model.decoder.num_query_groups"),
        "num-query-groups": _computed("model.decoder.num_query_groups", "counts with --group-query-attention only"),
        "kv-channels": _key("model.decoder.kv_channels"),
        "vocab-size": _computed("model.decoder.vocab_size"),
        "make-vocab-size-divisible-by": _implied("a multiple of 128 that tensor parallelism divides", "128"),
        "rotary-base": _key("model.decoder.rotary_base"),
        "rotary-percent": _implied("all of a head is rotated", "1.0", "1"),
        "use-rope-scaling": _computed("model.decoder.rope_scaling_factor"),
        "rope-scaling-factor": _computed("model.decoder.rope_scaling_factor", "counts with --use-rope-scaling only"),
        "position-embedding-type": _implied("positions are rotary", "rope"),
        "max-position-embeddings": _implied("rotary positions have no table"),
        "normalization": _implied("norms are RMSNorm", "RMSNorm"),
        "norm-epsilon": _key("model.decoder.layernorm_epsilon"),
        "apply-layernorm-1p": _implied("the language model types switch it off"),
        "swiglu": _implied("feed-forward layers are SwiGLU"),
        "disable-bias-linear": _implied("linear layers have no biases"),
        "add-qkv-bias": _flag("model.decoder.add_qkv_bias"),
        "qk-layernorm": _flag("model.decoder.qk_layernorm"),
        "untie-embeddings-and-output-weights": _computed("model.decoder.untie_embeddings_and_output_weights"),
        "init-method-std": _key("model.decoder.init_method_std"),
        "attention-dropout": _computed("", "an MM1 has no dropout: 0 is implied"),
        "hidden-dropout": _computed("", "an MM1 has no dropout: 0 is implied"),
        "attention-softmax-in-fp32": _implied("attention's kernels do it"),
        "no-masked-softmax-fusion": _implied("attention's kernels decide"),
        "hybrid-layer-pattern": _none("theirs has Mamba layers; ours (parallel.hybrid_layer_pattern) is about stages"),
        "spec": _none("layers are chosen by training.layer_backend"),
    },
    "Experts": {
        "num-experts": _key("model.moe.num_moe_experts"),
        "moe-layer-freq": _computed("model.moe.moe_layer_freq", "1 only: of every Nth block theirs is the first"),
        "moe-ffn-hidden-size": _key("model.moe.moe_ffn_hidden_size"),
        "moe-router-topk": _key("model.moe.moe_router_topk"),
        "moe-router-score-function": _key("model.moe.moe_router_score_function"),
        "moe-router-pre-softmax": _flag("model.moe.moe_router_pre_softmax"),
        "moe-router-load-balancing-type": _implied("experts are balanced by an auxiliary loss", "aux_loss"),
        "moe-aux-loss-coeff": _key(
            "model.moe.moe_aux_loss_coeff", "ours is a mean over the tokens it is computed on; theirs is larger"
        ),
        "moe-z-loss-coeff": _key("model.moe.moe_z_loss_coeff"),
        "moe-token-dispatcher-type": _key("model.moe.moe_token_dispatcher_type"),
        "moe-expert-capacity-factor": _key("model.moe.moe_expert_capacity_factor", "ours leaves padding out"),
        "moe-router-enable-expert-bias": _flag("model.moe.moe_router_enable_expert_bias"),
        "moe-router-bias-update-rate": _key("model.moe.moe_router_bias_update_rate"),
        "moe-grouped-gemm": _implied("experts are multiplied together wherever the backend can"),
        "moe-shared-expert-intermediate-size": _none("an MM1 has no shared experts"),
        "unfreeze-router": _none(_UNREAD),
    },
    "Tower and connector": {
        "vision-model-type": _computed("model.vision", "clip and siglip"),
        "img-h": _computed("model.vision.image_size", "squares only"),
        "img-w": _computed("model.vision.image_size", "squares only"),
        "patch-dim": _computed("model.vision.patch_size"),
        "disable-vision-class-token": _computed("model.connector.tokens_per_image", "ours never has it among them"),
        "class-token-len": _none("a tower has one class token or none"),
        "vision-projection-type": _computed("model.connector.connector", "mlp only"),
        "pixel-shuffle": _none(
            "no built-in connector does it: examples/extend/pixel_shuffle.py is one of your own that does, "
            "or take c_abstractor and choose model.connector.tokens_per_image"
        ),
        "conv-merging": _none("take c_abstractor, which merges by convolutions, and choose tokens_per_image"),
        "use-vision-backbone-fp8-arch": _none(_RADIO),
        "radio-force-eval-mode": _none(_RADIO),
        "radio-force-cpe-eval-mode": _none(_RADIO),
        "radio-interpolate-only-cpe": _none(_RADIO),
        "radio-cpe-aspect-ratio-select": _none(_RADIO),
        "radio-disable-cpe": _none(_RADIO),
    },
    "Images": {
        "use-tiling": _computed(
            "data.image_tiling", "`dynamic` chooses another grid, by MM1.5's rule, for documents of at most two images"
        ),
        "max-num-tiles": _computed("data.max_image_tiles"),
        "use-thumbnail": _computed("data.image_tiling", "an overview always follows several tiles"),
        "thumbnail-area-threshold": _none(_UNREAD),
        "use-area-weighted-aspect-ratio": _none("the grid is chosen by MM1.5's rule"),
        "use-tile-tags": _computed("data.tile_indicators", "MM1.5's `(k,i,j)` in place of numbered tags"),
        "image-tag-type": _computed("", "images are not put between tags; empty is implied"),
        "apply-data-augment": _none(_UNREAD + "; ours is data.random_resized_crop"),
        "dynamic-resolution": _none(_RESOLUTION),
        "dynamic-resolution-min-patches": _none(_RESOLUTION),
        "dynamic-resolution-max-patches": _none(_RESOLUTION),
        "dynamic-resolution-min-side": _none(_RESOLUTION),
        "dynamic-resolution-no-truncate": _none(_RESOLUTION),
        "match-tiling-dynamic-resolution": _none(_RESOLUTION),
        "masked-tiling-dynamic-resolution": _none(_RESOLUTION),
        "image-break-token": _none(_RESOLUTION),
    },
    "Data": {
        "data-path": _computed("data.sources", "an energon blend: prepare each of its data sets (mm1 data prepare)"),
        "dataset-config": _none(_UNREAD),
        "prompt-path": _none("prompts are part of the prepared data: write them into the conversations"),
        "split": _implied("training and validation are data sets of their own"),
        "dataloader-type": _implied("there is one loader", "external"),
        "dataloader-save": _implied("checkpoints hold the place in the data, which is a function of seed and step"),
        "dataloader-seq-length": _computed("data.seq_length", "the longest of the three lengths"),
        "decoder-seq-length": _computed("data.seq_length"),
        "seq-length": _implied("the tower's sequence follows from the image size"),
        "packing-seq-length": _computed("data.seq_length", "the longest of the three lengths"),
        "packing-buffer-size": _computed("data.packing_lookahead", "open sequences, not examples"),
        "packing-knapsack-algorithm": _implied("packing is best-fit; theirs is declared, and read by no public code"),
        "allow-cross-sample-attention": _none("packed examples never see each other"),
        "num-workers": _key("data.num_workers"),
        "dataloader-seed": _key("data.seed", _UNREAD),
        "tokenizer-type": _implied("the file says what it is", "MultimodalTokenizer", "HuggingFaceTokenizer"),
        "tokenizer-model": _computed("data.tokenizer", "tokenizer.json or a SentencePiece model, as a file"),
        "tokenizer-prompt-format": _none("the chat template is applied when conversations are prepared"),
        "special-tokens": _none("images have no token of their own; other symbols are added when a tokenizer is made"),
        "tokenizer-keep-history-thinking": _none(_UNREAD),
        "eos-id": _implied("the tokenizer says it"),
        "force-system-message": _none("system messages are part of the prepared conversations"),
        "eod-mask-loss": _none("the end of a document is learned"),
        "no-use-tokenizer-model-from-checkpoint-args": _implied("the configuration says which tokenizer it is"),
        "use-loss-scaling": _none("every trained token counts the same"),
        "no-calculate-per-token-loss": _none(_UNREAD + "; the loss is always a mean over trained tokens"),
        "only-keep-samples-with-img": _none(_UNREAD + "; filter when data is prepared"),
        "relax-sender-check": _none(_UNREAD),
        "relax-thinking-trace-check": _none(_UNREAD),
        "use-new-dataloader-path": _none(_UNREAD),
        "optimize-broadcast": _none(_UNREAD),
        "lr-data-range-start": _none(_UNREAD),
        "lr-data-range-end": _none(_UNREAD),
    },
    "Optimizer and schedule": {
        "optimizer": _implied("it is AdamW", "adam"),
        "lr": _key("optimizer.lr"),
        "min-lr": _computed("optimizer.min_lr_ratio", "a share of the peak"),
        "lr-decay-style": _computed("optimizer.min_lr_ratio", "cosine, or constant as a cosine that ends at its peak"),
        "lr-decay-iters": _computed("optimizer.lr_decay_iters"),
        "lr-decay-samples": _computed("optimizer.lr_decay_iters", "by the global batch size"),
        "lr-warmup-iters": _computed("optimizer.lr_warmup_iters"),
        "lr-warmup-samples": _computed("optimizer.lr_warmup_iters", "by the global batch size"),
        "lr-warmup-fraction": _computed("optimizer.lr_warmup_iters", "of the decay"),
        "lr-warmup-init": _implied("warm-up begins at 0", "0", "0.0"),
        "weight-decay": _key("optimizer.weight_decay"),
        "weight-decay-incr-style": _implied("weight decay does not change", "constant"),
        "adam-beta1": _key("optimizer.adam_beta1"),
        "adam-beta2": _key("optimizer.adam_beta2"),
        "adam-eps": _key("optimizer.adam_eps"),
        "clip-grad": _key("optimizer.clip_grad"),
        "micro-batch-size": _key("training.micro_batch_size"),
        "global-batch-size": _computed("training.global_batch_size", "packed sequences, theirs samples unless packed"),
        "rampup-batch-size": _none("write training.batch_size_ramp, which goes by steps"),
        "step-batch-size-schedule": _none("write training.batch_size_ramp, which goes by steps"),
        "train-iters": _computed("training.train_iters"),
        "train-samples": _computed("training.train_iters", "by the global batch size"),
        "seed": _key("training.seed"),
        "freeze-LM": _computed("training.freeze"),
        "freeze-ViT": _computed("training.freeze"),
        "freeze-vision-projection": _none("the example's model.py passes False whatever it is; ours: training.freeze"),
    },
    "Layout and speed": {
        "tensor-model-parallel-size": _key("parallel.tensor_model_parallel_size"),
        "pipeline-model-parallel-size": _key("parallel.pipeline_model_parallel_size"),
        "num-layers-per-virtual-pipeline-stage": _computed("parallel.virtual_pipeline_model_parallel_size"),
        "num-virtual-stages-per-pipeline-rank": _key("parallel.virtual_pipeline_model_parallel_size"),
        "decoder-first-pipeline-num-layers": _key("parallel.decoder_first_pipeline_num_layers"),
        "context-parallel-size": _key("parallel.context_parallel_size"),
        "expert-model-parallel-size": _key("parallel.expert_model_parallel_size"),
        "expert-tensor-parallel-size": _key("parallel.expert_tensor_parallel_size"),
        "sequence-parallel": _flag("parallel.sequence_parallel"),
        "use-distributed-optimizer": _flag("parallel.use_distributed_optimizer"),
        "overlap-grad-reduce": _flag("parallel.overlap_grad_reduce"),
        "overlap-param-gather": _none("parameters are gathered at the end of a step"),
        "distributed-timeout-minutes": _key("parallel.distributed_timeout_minutes"),
        "bf16": _computed("training.precision"),
        "fp16": _computed("", "bf16 and fp32 only"),
        "fp8-format": _computed("fp8.decoder_recipe, tower_recipe, connector_recipe"),
        "fp8-recipe": _computed("fp8.decoder_recipe, tower_recipe, connector_recipe", "all but mxfp8"),
        "fp8-param-gather": _flag("fp8.fp8_param"),
        "transformer-impl": _implied("the example builds its layers by --use-te"),
        "use-te": _computed("training.layer_backend", "local without it"),
        "use-flash-attn": _implied("training.attention_kernel says which kernel"),
        "enable-fusions": _implied("on as far as the backend has them; theirs is declared, and read by no public code"),
        "recompute-activations": _computed("training.recompute_granularity", "selective"),
        "recompute-granularity": _key("training.recompute_granularity"),
        "recompute-method": _key("training.recompute_method"),
        "recompute-num-layers": _computed(
            "training.recompute_num_layers", "theirs twice, as feed-forward counts apart"
        ),
        "recompute-modules": _computed("training.recompute_modules", "core_attn, mlp and moe"),
        "recompute-vision": _computed("training.vision_recompute", "with --recompute-granularity and -method only"),
        "recompute-vision-num-layers": _none(_UNREAD),
        "recompute-granularity-vision": _none(_UNREAD),
        "recompute-method-vision": _none(_UNREAD),
        "recompute-vision-projection": _none(_UNREAD),
        "decoder-tp-comm-overlap": _none("not offered until it has run on GPUs with this model"),
    },
    "Checkpoints, logs and evaluation": {
        "save": _key("run_dir", "checkpoints and logs go into the run's folder"),
        "load": _computed("checkpoint.load", "nothing where it is --save: runs go on by themselves"),
        "pretrained-checkpoint": _computed("checkpoint.load, finetune", "convert it first (mm1 convert import)"),
        "finetune": _computed("checkpoint.finetune"),
        "save-interval": _key("checkpoint.save_interval"),
        "save-retain-interval": _key("checkpoint.keep_every"),
        "async-save": _implied("checkpoints are written while training goes on (checkpoint.async_save)"),
        "ckpt-format": _implied("there is one format"),
        "use-checkpoint-args": _none("sizes that their checkpoint has instead are not in the script"),
        "allow-missing-vision-projection-checkpoint": _implied("checkpoint.finetune draws anew what is missing"),
        "allow-missing-conv-merge-checkpoint": _implied("checkpoint.finetune draws anew what is missing"),
        "exit-duration-in-mins": _none("a run saves and ends when Slurm signals that its time is up (docs/cluster.md)"),
        "eval-interval": _key("training.eval_interval"),
        "eval-iters": _key("training.eval_iters", "microbatches per source, where theirs are global batches"),
        "online-evaluation-config": _none("evaluation.tasks, interval and data have tasks of ours"),
        "log-interval": _key("logging.log_interval"),
        "tensorboard-dir": _implied("always on, in the run's folder (logging.tensorboard)"),
        "wandb-project": _key("logging.wandb_project"),
        "log-params-norm": _none(_LOGS),
        "log-num-zeros-in-grad": _none(_LOGS),
        "log-model-grad-norms": _none(_UNREAD),
        "log-model-act-norms": _none(_UNREAD),
        "use-mcore-inference": _implied("it is about inference there"),
        "inference-max-seq-length": _implied("it is about inference there"),
    },
    "Sound and video": {
        **dict.fromkeys(
            (
                "sound-model-type",
                "freeze-sound-model",
                "freeze-sound-projection",
                "allow-missing-sound-projection-checkpoint",
                "allow-missing-sound-model-checkpoint",
                "recompute-sound",
                "recompute-sound-projection",
                "sound-target-rate",
                "sound-embedding-size",
                "sound-clip-duration",
                "sound-min-duration",
                "sound-pad-to-clip-duration",
                "sound-batch-split",
            ),
            _none(_SOUND),
        ),
        **dict.fromkeys(
            (
                "num-frames",
                "video-min-num-frames",
                "video-max-num-frames",
                "video-default-fps",
                "video-frame-temporal-jitter",
                "video-target-img-size",
                "video-target-num-patches",
                "video-maintain-aspect-ratio",
                "video-temporal-patch-size",
                "allow-checkpoint-without-temporal-compression",
                "separate-video-embedder",
                "video-prompt-version",
                "allow-large-videos",
                "efficient-video-sampling-variant",
                "video-aug-scale-frames-up",
                "video-aug-scale-resolution-only",
                "video-aug-scale-resolution-up",
            ),
            _none(_VIDEO),
        ),
    },
}

ALL: Mapping[str, Option] = {name: option for group in OPTIONS.values() for name, option in group.items()}

DEFAULTS: Mapping[str, str] = {
    "adam-beta2": "0.999",
    "weight-decay": "0.01",
    "min-lr": "0",
    "lr-decay-style": "linear",
    "log-interval": "100",
    "eval-iters": "100",
    "dataloader-seed": "0",
    "img-h": "224",
    "img-w": "224",
    "patch-dim": "16",
    "vision-model-type": "clip",
    "position-embedding-type": "learned_absolute",
    "normalization": "LayerNorm",
    "attention-dropout": "0.1",
    "hidden-dropout": "0.1",
}
"""What Megatron-LM takes where a script is silent, as far as our defaults are others."""


def table() -> str:
    """The options by topic, as Markdown."""
    lines = []
    for title, options in OPTIONS.items():
        lines += [f"### {title}", "", "| theirs | ours | |", "| --- | --- | --- |"]
        lines += [f"| `--{name}` | {_ours(option)} | {_note(option)} |" for name, option in options.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def _ours(option: Option) -> str:
    if option.fate == "none":
        return "none"
    if not option.ours:
        return "nothing to set"
    keys = ", ".join(f"`{key}`" for key in option.ours.split(", "))
    return f"{keys} `{option.value}`" if option.fate == "flag" and option.value != "true" else keys


def _note(option: Option) -> str:
    accepted = f" (`{'`, `'.join(option.accepted)}`)" if option.accepted else ""
    return option.note + accepted
