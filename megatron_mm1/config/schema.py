"""The configuration as frozen dataclasses.

Field names are Megatron's where Megatron has one. Defaults are MM1's; a tag says how sure: [P] a published source
quotes the paper, [M] widely reported, [C] our choice where the paper is silent (docs/facts.md). A field exists only if
something reads it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder tower. Defaults: ViT-H/14 at 378 px [P], as the public apple/DFN5B-CLIP-ViT-H-14-378 has it."""

    tower: str = "vit"
    """Built-in name or class path of the tower."""
    image_size: int = 378
    """Side of the square image, px."""
    patch_size: int = 14
    """Side of a patch, px; `image_size` is a multiple of it."""
    num_layers: int = 32
    hidden_size: int = 1280
    ffn_hidden_size: int = 5120
    num_attention_heads: int = 16
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    layernorm_epsilon: float = 1e-5
    class_token: bool = True
    """A learned class token in front of the patches (CLIP); False for SigLIP."""
    pre_layernorm: bool = True
    """A layer norm between the embeddings and the first block (CLIP); False for SigLIP."""
    patch_bias: bool = False
    """A bias in the patch convolution (SigLIP)."""
    feature_layer: int = -1
    """Whose output is the image feature: -1 the last block, -2 the one before (LLaVA); later blocks are not built."""
    final_layernorm: bool = True
    """Apply the tower's last layer norm to the features; LLaVA does not."""
    image_resize: Literal["squash", "shorter_side_crop", "pad"] = "squash"
    """How an image becomes a square: all of it resized (MM1, DFN), its shorter side resized and the centre taken
    (OpenAI's CLIP), or first padded with the mean colour and then resized (LLaVA-1.5).
    """
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Vision-language connector. Default: C-Abstractor with 144 tokens per image, MM1's final choice [P]."""

    connector: str = "c_abstractor"
    """Built-in name (average_pool, attention_pool, c_abstractor, mlp) or class path."""
    tokens_per_image: int = 144
    """Tokens an image takes in the decoder's sequence; for `mlp` it is the number of patches."""
    hidden_size: int = 1024
    """Width of the C-Abstractor's blocks (Honeybee) and of attention pooling's queries [C]."""
    num_layers: int = 3
    """Blocks per stage of the C-Abstractor (Honeybee)."""
    num_attention_heads: int = 16
    """Heads of attention pooling [C]."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for a connector of the user's own; the built-in ones take none."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The decoder-only language model: pre-norm RMSNorm, SwiGLU, RoPE, no biases, untied output [C]."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    """Key/value heads (GQA); None: one per attention head."""
    kv_channels: int | None = None
    """Head dim; None: hidden_size / num_attention_heads."""
    vocab_size: int = 32000
    """The tokenizer's size at most; padded for tensor parallelism [C]."""
    rotary_base: float = 10000.0
    rope_scaling_factor: float | None = None
    """Stretch slow rotations by this factor as Llama 3.1 does (made for 8192 positions); None: none are."""
    layernorm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts in place of the decoder's feed-forward layers [P]."""

    num_moe_experts: int
    moe_layer_freq: int
    """Block i has experts where (i + 1) % moe_layer_freq == 0 (Hugging Face's decoder_sparse_step)."""
    moe_ffn_hidden_size: int | None = None
    """An expert's width; None: the decoder's ffn_hidden_size."""
    moe_router_topk: int = 2
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    """Weigh the chosen experts by the softmax over all experts; without it they sum to 1 (norm_topk_prob)."""
    moe_aux_loss_coeff: float = 0.01
    moe_z_loss_coeff: float = 0.001
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach the experts of other ranks: "alltoall" sends each where it goes, "allgather" all to all."""
    moe_expert_capacity_factor: float | None = None
    """Tokens an expert takes from a rank, as a multiple of an even share of those that are not padding; what exceeds it
    is dropped, the least probable first. Which tokens share a rank depends on the layout. None: nothing is dropped.
    """
    moe_router_enable_expert_bias: bool = False
    """Steer the choice of experts by a bias that is raised for those with few tokens; needs sigmoid scores."""
    moe_router_bias_update_rate: float = 1e-3
    """How far a step moves that bias."""


LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
"""megatron-core's names of a block's linear layers: attention's input and output, the feed-forward layer's two."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W x + scale B A x, of which A and B are trained and W is not. A decoder or
    tower with adapters is frozen but for them; other parts are trained unless `training.freeze` names them.
    """

    rank: int
    alpha: float
    """The adapters' scale is alpha / rank."""
    use_rslora: bool = False
    """alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dropout: float = 0.0
    """Of an adapter's input, in training."""
    decoder_targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """The decoder's layers that get adapters; one for queries, keys and values, and one for SwiGLU's gate and up."""
    tower_targets: tuple[LoraTarget, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    decoder: DecoderConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    moe: MoEConfig | None = None
    lora: LoraConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over processes; the data-parallel size is what is left of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    """Stretches of the decoder on each pipeline rank, run in turns (interleaved schedule)."""
    context_parallel_size: int = 1
    """Ranks that share the positions of each sequence."""
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    """Ranks that share the matrices of each expert."""
    sequence_parallel: bool = False
    decoder_first_pipeline_num_layers: int | None = None
    """Decoder blocks beside the tower on the first stage, 0 for none; None: balanced by FLOPs."""
    hybrid_layer_pattern: str | None = None
    """The decoder's layers by stage, as `*-|*-*-`: `*` attention, `-` feed-forward, `E` experts, `|` where the next
    stage begins (with virtual stages the first one of each rank, then the second, ..). None: computed.
    """
    vision_parallel_mode: Literal["tensor", "data"] = "tensor"
    """How ranks that hold the same sequences share the images of a microbatch: "tensor" splits the tower's layers over
    tensor-parallel ranks like the decoder's; "data" gives each the whole tower and its share of the images."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    distributed_timeout_minutes: int = 10
    """How long a collective waits, and how long the job may stand still between two steps."""
    heartbeat_timeout_seconds: int = 60
    """A rank that gives no sign of life for so long is dead, and the others end (docs/faults.md); 0: do not watch."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One prepared data set (the folder `mm1 data prepare` wrote)."""

    name: str
    path: str
    weight: float = 1.0
    """Share of the mixture, relative to the other weights, in `data.mixture_unit`."""
    max_epochs: float | None = None
    """Training sees it no more often than this; then its share goes to the other sources. None: without end."""


@dataclass(frozen=True, kw_only=True)
class CurriculumPhase:
    """Another mixture from one step of training on; what came before is not changed by it."""

    step: int
    weights: dict[str, float]
    """By name of the source; one that is left out gives nothing."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    tokenizer: str = ""
    """SentencePiece model file, or tokenizer.json of Hugging Face."""
    sources: tuple[SourceConfig, ...] = ()
    """Training mixture. MM1: 45 % captions, 45 % interleaved, 10 % text [P]."""
    curriculum: tuple[CurriculumPhase, ...] = ()
    """Later mixtures of the same sources, by increasing step; before the first the sources' own weights hold."""
    mixture_unit: Literal["sequences", "tokens", "examples"] = "sequences"
    """What weights are shares of: sequences [P], filled positions (of text and images), or documents."""
    packing: Literal["single_source", "mixed", "none"] = "single_source"
    """Pack each sequence from one source [P], or from all of them, which fills sequences better; or give every document
    sequences of its own, so that a step takes as many documents as sequences and much of each is padding.
    """
    validation: tuple[SourceConfig, ...] = ()
    """Held-out sets; each is reported on its own, so weights are ignored here."""
    seq_length: int = 4096
    """Positions per sequence [P]."""
    max_images_per_sequence: int = 16
    """[P]"""
    long_documents: Literal["split", "cut", "drop"] = "split"
    """What becomes of a document that does not fit a sequence: all of it in stretches; "cut" where the last trained
    stretch ends that fits, as a conversation's answer does, without the rest; or left out. None is cut inside an image.
    """
    packing_lookahead: int = 64
    """Sequences kept open while packing best-fit."""
    text_only: bool = False
    """Leave every image and its slots out: the same examples in the same sequences, seen blind."""
    image_tiling: Literal["none", "overview_and_crops", "dynamic"] = "none"
    """Several encoded images for one of high resolution: "overview_and_crops" the whole and its quarters (MM1 [P]),
    "dynamic" the grid that suits it, where its document has no more than two images (MM1.5).
    """
    min_image_tiles: int = 1
    max_image_tiles: int = 4
    """Tiles of a dynamic grid, the overview not counted."""
    tile_indicators: bool = False
    """Text "(k,i,j)" in front of each tile of an image of several: image k, row i, column j; "(k,0,0)" is the whole
    image (MM1.5 [P], as text [M]).
    """
    random_resized_crop: tuple[float, float] | None = None
    """Train on a random part of each image, its area between these shares of the whole; never in validation."""
    image_decoder: Literal["cpu", "gpu"] = "cpu"
    """Where training images are decoded and resized; validation always does it on the CPU."""
    num_workers: int = 2
    """Loader processes per rank; 0 decodes in a thread of the training process."""
    prefetch_factor: int = 2
    """Microbatches that each loader process, or the thread, keeps ready."""
    max_worker_restarts: int = 3
    """Deaths of loader processes without a microbatch between them that are made good; one more ends the run."""
    seed: int = 1234
    """Seed of order and packing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW in PyTorch's form: weight_decay is multiplied by the learning rate (the paper's lambda = 0.1 lr [P/M]). Or
    AdaFactor with given learning rates, as the paper fine-tunes [P].
    """

    lr: float
    """Peak learning rate of the decoder, and of each component without one of its own."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """AdaFactor keeps second moments of a matrix as a row and a column of it, and no first ones."""
    vision_lr: float | None = None
    connector_lr: float | None = None
    min_lr_ratio: float = 0.1
    """The cosine ends at this share of each peak [P]."""
    lr_warmup_iters: int = 2000
    """Linear warm-up from 0 [P]."""
    lr_decay_iters: int | None = None
    """Length of the cosine, warm-up included; None: train_iters."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    adafactor_decay_rate: float = -0.8
    """Step n counts as n to this power in the running mean of squared gradients (AdaFactor's paper)."""
    adafactor_eps: float = 1e-30
    """Added to squared gradients."""
    adafactor_clip_threshold: float = 1.0
    """Limit of the root mean square of a tensor's update before the learning rate."""
    clip_grad: float = 1.0
    """Global gradient norm limit [M]."""


AttentionKernel = Literal["torch", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class BatchSizeStage:
    """A stretch of smaller (or other) batches before `training.global_batch_size` holds."""

    until: int
    """The first step that is not in it, counted from 0."""
    global_batch_size: int
    """Sequences per step."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    micro_batch_size: int = 1
    """Sequences per rank and microbatch."""
    global_batch_size: int = 512
    """Sequences per step [P]."""
    batch_size_ramp: tuple[BatchSizeStage, ...] = ()
    """Other batch sizes to begin with, by increasing `until`. Warm-up and cosine go by sequences, not by steps."""
    train_iters: int = 200_000
    """Steps [P]."""
    eval_interval: int = 1000
    """Steps between validations, which also run before the first step and after the last; 0: never."""
    eval_iters: int = 8
    """Microbatches per source in one validation."""
    precision: Literal["bf16", "fp32"] = "bf16"
    layer_backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """auto: Transformer Engine where it works, else local."""
    attention_kernel: AttentionKernel = "torch"
    """Attention of the Transformer Engine backend: torch's flash kernels, or those that Transformer Engine finds,
    flash-attn's where that is installed, cuDNN's where its version will do; an error where it finds none."""
    freeze: tuple[Literal["tower", "connector", "decoder"], ...] = ()
    """Parts that are not trained: without gradients and optimizer state."""
    frozen_steps: dict[str, int] = field(default_factory=dict)
    """Parts (tower, connector, decoder) that are not trained in the first so many steps, and then are."""
    output_z_loss_coeff: float = 0.0
    """Weight of the squared log-sum-exp of the output logits of trained tokens; 1e-4 in the 30B [M]. The losses that
    are reported leave it out.
    """
    recompute_granularity: Literal["selective", "full"] | None = None
    """Compute activations of the decoder anew in the backward pass instead of keeping them: of `recompute_modules`, or
    of whole layers."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] = ("core_attn",)
    """What "selective" recomputes."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """What "full" recomputes: every stretch of `recompute_num_layers` layers, or that many single layers of a stage."""
    recompute_num_layers: int = 2
    """Attention and feed-forward count as a layer each: 2 are a block."""
    vision_recompute: bool = False
    """Recompute each block of the tower."""
    device_memory_gib: float | None = None
    """What a device has for a rank; a run that is planned to take more is refused (mm1 plan memory). None: none is."""
    seed: int = 1234
    """Seed of the initial weights."""


Fp8Recipe = Literal["bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise"]
"""How linear layers multiply: in bf16, or in FP8 with one scale per tensor taken from earlier steps ("fp8_delayed"),
one per tensor taken from the tensor ("fp8_tensorwise"), or one per 128 values ("fp8_blockwise")."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Transformer Engine's FP8 products by component; everything else stays in bf16 [C]."""

    decoder_recipe: Fp8Recipe = "bf16"
    """Attention projections and dense feed-forward layers; embedding and output layer stay in bf16."""
    experts_recipe: Fp8Recipe | None = None
    """Experts' feed-forward layers; null: as `decoder_recipe`."""
    tower_recipe: Fp8Recipe = "bf16"
    connector_recipe: Fp8Recipe = "bf16"
    """Its last linear layers; convolutions and attention pooling stay in bf16."""
    bf16_blocks_at_start: int = 0
    """First decoder blocks that stay in bf16."""
    bf16_blocks_at_end: int = 0
    """Last decoder blocks that stay in bf16."""
    fp8_param: bool = False
    """Keep the weights of the decoder's FP8 layers in FP8, as the distributed optimizer then also gathers them; its
    master weights are float32 as ever."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    save_interval: int = 1000
    """Steps between checkpoints; one is also written after the last step. 0: only then."""
    load: str | None = None
    """A checkpoint, or a folder of them, for a new run to start from. A run that has checkpoints of its own goes on
    from the newest of those.
    """
    finetune: bool = False
    """Take only the weights of `load`: a new optimizer, schedule and data order, starting at step 0. Parts of the model
    that `load` lacks keep their initial weights.
    """
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy of the state in host memory."""
    keep_last: int | None = None
    """How many of the newest checkpoints stay; None: all."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps stay in spite of `keep_last`."""
    accept_other_data: bool = False
    """Go on from `load` or the run's own checkpoint with another data plan than it was trained on, from the same number
    of sequences.
    """
    accept_other_schedule: bool = False
    """Go on from `load` or the run's own checkpoint with other optimizer settings, batch sizes, frozen steps or z-loss,
    each of which is then named. Steps that were taken keep their batch sizes (`training.batch_size_ramp`).
    """
    max_save_failures: int = 2
    """Checkpoints in a row that may fail to be written (a full disk); one more, or the last one, ends the run."""


FaultPolicy = Literal["skip", "rollback", "stop"]
"""What to do about a step that went wrong: leave its update out and go on with the next batch; go back to an earlier
checkpoint, replay the batches since and pass this one over; or end the run."""


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Steps that go wrong, and ranks that stand still or lag behind (docs/faults.md) [C]."""

    nonfinite_policy: FaultPolicy = "skip"
    """Where the loss or the gradient norm is infinite or not a number."""
    spike_policy: Literal["off", "skip", "rollback", "stop"] = "off"
    """Where the gradient norm is more than `spike_factor` times its median over the last `spike_window` updates."""
    spike_factor: float = 10.0
    spike_window: int = 100
    """Updates; no norm counts as a spike before there have been so many."""
    max_consecutive_skips: int = 10
    """Steps in a row that may be skipped; one more ends the run."""
    rollback_steps: int = 1
    """A rollback goes to the newest checkpoint that is at least so many steps old; without one the step is skipped."""
    max_rollbacks: int = 3
    """Rollbacks to the same checkpoint; one more ends the run."""
    hang_timeout_seconds: int | None = None
    """How long the job may stand still before every rank writes its stacks down and ends; null:
    `parallel.distributed_timeout_minutes`, less 5 s."""
    straggler_factor: float = 1.5
    """A rank that works so many times as long as the median rank is named in the log; 0: do not measure."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Tasks that a run evaluates on its weights as they are; the training does not notice."""

    interval: int = 0
    """Steps between evaluations, of which one comes before the first step and one after the last. 0: none."""
    tasks: tuple[str, ...] = ()
    """Built-in names or import paths, as for mm1 eval."""
    data: dict[str, str] = field(default_factory=dict)
    """Folder of a task's data, by task; not of those that know their own."""
    shots: tuple[int, ...] = (0,)
    """Numbers of demonstrations, each evaluated."""
    limit: int | None = 256
    """Items per task at most; None: all."""
    seed: int = 0
    """Of the choice of demonstrations."""
    chat: bool = False
    """Every prompt is what the user of a conversation says, in the tokenizer's chat template (mm1 eval --chat)."""
    chat_template: str | None = None
    """File of another chat template; it has `chat` be on."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    log_interval: int = 10
    """Steps between console lines."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Project in Weights & Biases to log to as well, under one run however often training stops and goes on."""
    progress_bar: bool | None = None
    """None: where standard error is a terminal."""


@dataclass(frozen=True, kw_only=True)
class MM1Config:
    """Everything a training run is made of."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run_dir: str = "runs/mm1"
    """Checkpoints, logs and the resolved configuration go here."""
