"""`mm1 config from-megatron`: bash says what a script's arguments are, the schema and `validate` what is a run."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_mm1.cli import USER_ERROR, main
from megatron_mm1.config.derived import smallest_world_size
from megatron_mm1.config.keys import all_keys, value_at
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import UserError
from megatron_mm1.migration.commands import as_yaml
from megatron_mm1.migration.convert import Migration, migrate
from megatron_mm1.migration.models import LANGUAGES, TOWERS
from megatron_mm1.migration.options import ALL, DEFAULTS, table
from megatron_mm1.migration.shell import read_script

DOCS = Path(__file__).parents[2] / "docs"

MODEL = (
    "--language-model-type mistral_7b --num-layers 8 --hidden-size 512 --num-attention-heads 8 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --img-h 336 --img-w 336 --patch-dim 14 "
    "--disable-vision-class-token --decoder-seq-length 2048 --micro-batch-size 2 --global-batch-size 32 "
    "--train-iters 1000 --lr 1e-4 --lr-decay-style cosine --use-te"
)
"""Enough of a run to be one."""

# Options beyond MODEL -> key and value. Under the option that the case is of.
CASES: dict[str, tuple[str, str, object]] = {
    "language-model-type": ("--language-model-type qwen2.5_7B", "model.decoder.add_qkv_bias", True),
    "num-layers": ("--num-layers 12", "model.decoder.num_layers", 12),
    "hidden-size": ("--hidden-size 1024", "model.decoder.hidden_size", 1024),
    "ffn-hidden-size": ("--language-model-type other --ffn-hidden-size 640", "model.decoder.ffn_hidden_size", 640),
    "num-attention-heads": ("--num-attention-heads 16", "model.decoder.num_attention_heads", 16),
    "group-query-attention": ("--group-query-attention", "model.decoder.num_query_groups", 1),
    "num-query-groups": ("--group-query-attention --num-query-groups 4", "model.decoder.num_query_groups", 4),
    "kv-channels": ("--kv-channels 128", "model.decoder.kv_channels", 128),
    "vocab-size": ("--vocab-size 1000", "model.decoder.vocab_size", 1000),
    "rotary-base": ("--rotary-base 500000", "model.decoder.rotary_base", 5e5),
    "use-rope-scaling": ("--use-rope-scaling", "model.decoder.rope_scaling_factor", 8.0),
    "rope-scaling-factor": ("--use-rope-scaling --rope-scaling-factor 32", "model.decoder.rope_scaling_factor", 32.0),
    "norm-epsilon": ("--norm-epsilon 1e-6", "model.decoder.layernorm_epsilon", 1e-6),
    "add-qkv-bias": ("--add-qkv-bias", "model.decoder.add_qkv_bias", True),
    "qk-layernorm": ("--qk-layernorm", "model.decoder.qk_layernorm", True),
    "untie-embeddings-and-output-weights": (
        "--untie-embeddings-and-output-weights",
        "model.decoder.untie_embeddings_and_output_weights",
        True,
    ),
    "init-method-std": ("--init-method-std 0.014", "model.decoder.init_method_std", 0.014),
    "num-experts": ("--num-experts 4", "model.moe.num_moe_experts", 4),
    "moe-layer-freq": ("--num-experts 4 --moe-layer-freq 1", "model.moe.moe_layer_freq", 1),
    "moe-ffn-hidden-size": ("--num-experts 4 --moe-ffn-hidden-size 256", "model.moe.moe_ffn_hidden_size", 256),
    "moe-router-topk": ("--num-experts 4 --moe-router-topk 3", "model.moe.moe_router_topk", 3),
    "moe-router-score-function": (
        "--num-experts 4 --moe-router-score-function sigmoid",
        "model.moe.moe_router_score_function",
        "sigmoid",
    ),
    "moe-router-pre-softmax": ("--num-experts 4 --moe-router-pre-softmax", "model.moe.moe_router_pre_softmax", True),
    "moe-aux-loss-coeff": ("--num-experts 4 --moe-aux-loss-coeff 0.02", "model.moe.moe_aux_loss_coeff", 0.02),
    "moe-z-loss-coeff": ("--num-experts 4 --moe-z-loss-coeff 0.003", "model.moe.moe_z_loss_coeff", 0.003),
    "moe-token-dispatcher-type": (
        "--num-experts 4 --moe-token-dispatcher-type allgather",
        "model.moe.moe_token_dispatcher_type",
        "allgather",
    ),
    "moe-expert-capacity-factor": (
        "--num-experts 4 --moe-expert-capacity-factor 1.5",
        "model.moe.moe_expert_capacity_factor",
        1.5,
    ),
    "moe-router-enable-expert-bias": (
        "--num-experts 4 --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
        "model.moe.moe_router_enable_expert_bias",
        True,
    ),
    "moe-router-bias-update-rate": (
        "--num-experts 4 --moe-router-bias-update-rate 0.01",
        "model.moe.moe_router_bias_update_rate",
        0.01,
    ),
    "vision-model-type": ("--vision-model-type siglip --img-h 378 --img-w 378", "model.vision.num_layers", 27),
    "img-h": ("--img-h 224 --img-w 224", "model.vision.image_size", 224),
    "img-w": ("--img-h 224 --img-w 224", "model.connector.tokens_per_image", 256),
    "patch-dim": ("--patch-dim 28", "model.vision.patch_size", 28),
    "disable-vision-class-token": ("", "model.connector.tokens_per_image", 576),
    "vision-projection-type": ("--vision-projection-type mlp", "model.connector.connector", "mlp"),
    "use-tiling": ("--decoder-seq-length 8192 --use-tiling --max-num-tiles 6", "data.image_tiling", "dynamic"),
    "max-num-tiles": ("--decoder-seq-length 8192 --use-tiling --max-num-tiles 6", "data.max_image_tiles", 6),
    "use-thumbnail": (
        "--decoder-seq-length 8192 --use-tiling --max-num-tiles 6 --use-thumbnail",
        "data.image_tiling",
        "dynamic",
    ),
    "use-tile-tags": (
        "--decoder-seq-length 8192 --use-tiling --max-num-tiles 6 --use-tile-tags",
        "data.tile_indicators",
        True,
    ),
    "decoder-seq-length": ("--decoder-seq-length 1024", "data.seq_length", 1024),
    "dataloader-seq-length": ("--dataloader-seq-length 4096", "data.seq_length", 4096),
    "packing-seq-length": ("--packing-seq-length 8192", "data.seq_length", 8192),
    "packing-buffer-size": ("--packing-buffer-size 100", "data.packing_lookahead", 100),
    "num-workers": ("--num-workers 8", "data.num_workers", 8),
    "dataloader-seed": ("--dataloader-seed 7", "data.seed", 7),
    "tokenizer-model": ("--tokenizer-model org/name", "data.tokenizer", "org/name/tokenizer.json"),
    "data-path": ("--data-path blend.yaml", "data.sources", ()),
    "lr": ("--lr 2e-5", "optimizer.lr", 2e-5),
    "min-lr": ("--min-lr 1e-5", "optimizer.min_lr_ratio", 0.1),
    "lr-decay-style": ("--lr-decay-style constant", "optimizer.min_lr_ratio", 1.0),
    "lr-decay-iters": ("--lr-decay-iters 900", "optimizer.lr_decay_iters", 900),
    "lr-decay-samples": ("--lr-decay-samples 16000", "optimizer.lr_decay_iters", 500),
    "lr-warmup-iters": ("--lr-warmup-iters 30", "optimizer.lr_warmup_iters", 30),
    "lr-warmup-samples": ("--lr-warmup-samples 3200", "optimizer.lr_warmup_iters", 100),
    "lr-warmup-fraction": ("--lr-decay-iters 800 --lr-warmup-fraction .01", "optimizer.lr_warmup_iters", 8),
    "weight-decay": ("--weight-decay 0.05", "optimizer.weight_decay", 0.05),
    "adam-beta1": ("--adam-beta1 0.8", "optimizer.adam_beta1", 0.8),
    "adam-beta2": ("--adam-beta2 0.95", "optimizer.adam_beta2", 0.95),
    "adam-eps": ("--adam-eps 1e-7", "optimizer.adam_eps", 1e-7),
    "clip-grad": ("--clip-grad 0.5", "optimizer.clip_grad", 0.5),
    "micro-batch-size": ("--micro-batch-size 4", "training.micro_batch_size", 4),
    "global-batch-size": ("--global-batch-size 64", "training.global_batch_size", 64),
    "train-iters": ("--train-iters 77", "training.train_iters", 77),
    "train-samples": ("--train-samples 3200", "training.train_iters", 100),
    "seed": ("--seed 5", "training.seed", 5),
    "freeze-LM": ("--freeze-LM", "training.freeze", ("decoder",)),
    "freeze-ViT": ("--freeze-LM --freeze-ViT", "training.freeze", ("decoder", "tower")),
    "tensor-model-parallel-size": ("--tensor-model-parallel-size 2", "parallel.tensor_model_parallel_size", 2),
    "pipeline-model-parallel-size": ("--pipeline-model-parallel-size 2", "parallel.pipeline_model_parallel_size", 2),
    "num-layers-per-virtual-pipeline-stage": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
        "parallel.virtual_pipeline_model_parallel_size",
        2,
    ),
    "num-virtual-stages-per-pipeline-rank": (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4",
        "parallel.virtual_pipeline_model_parallel_size",
        4,
    ),
    "decoder-first-pipeline-num-layers": (
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3",
        "parallel.decoder_first_pipeline_num_layers",
        3,
    ),
    "context-parallel-size": ("--context-parallel-size 2", "parallel.context_parallel_size", 2),
    "expert-model-parallel-size": (
        "--num-experts 4 --expert-model-parallel-size 2",
        "parallel.expert_model_parallel_size",
        2,
    ),
    "expert-tensor-parallel-size": (
        "--num-experts 4 --expert-tensor-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        "parallel.expert_tensor_parallel_size",
        2,
    ),
    "sequence-parallel": ("--tensor-model-parallel-size 2 --sequence-parallel", "parallel.sequence_parallel", True),
    "use-distributed-optimizer": ("--use-distributed-optimizer", "parallel.use_distributed_optimizer", True),
    "overlap-grad-reduce": ("--overlap-grad-reduce", "parallel.overlap_grad_reduce", True),
    "distributed-timeout-minutes": ("--distributed-timeout-minutes 60", "parallel.distributed_timeout_minutes", 60),
    "bf16": ("--bf16", "training.precision", "bf16"),
    "fp8-format": ("--bf16 --fp8-format hybrid", "fp8.decoder_recipe", "fp8_delayed"),
    "fp8-recipe": ("--bf16 --fp8-format e4m3 --fp8-recipe blockwise", "fp8.tower_recipe", "fp8_blockwise"),
    "fp8-param-gather": (
        "--bf16 --fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather --use-distributed-optimizer",
        "fp8.fp8_param",
        True,
    ),
    "use-te": ("--use-te", "training.layer_backend", "transformer_engine"),
    "recompute-activations": ("--recompute-activations", "training.recompute_granularity", "selective"),
    "recompute-granularity": ("--recompute-granularity full", "training.recompute_granularity", "full"),
    "recompute-method": ("--recompute-granularity full --recompute-method block", "training.recompute_method", "block"),
    "recompute-num-layers": (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
        "training.recompute_num_layers",
        6,
    ),
    "recompute-modules": (
        "--recompute-granularity selective --recompute-modules core_attn mlp",
        "training.recompute_modules",
        ("core_attn", "mlp"),
    ),
    "recompute-vision": (
        "--recompute-granularity full --recompute-method uniform --recompute-vision",
        "training.vision_recompute",
        True,
    ),
    "save": ("--save out/run", "run_dir", "out/run"),
    "load": ("--save out --load out", "checkpoint.load", None),
    "pretrained-checkpoint": ("--pretrained-checkpoint theirs", "checkpoint.load", None),
    "finetune": ("--finetune", "checkpoint.finetune", False),
    "save-interval": ("--save-interval 250", "checkpoint.save_interval", 250),
    "save-retain-interval": ("--save-retain-interval 500", "checkpoint.keep_every", 500),
    "eval-interval": ("--eval-interval 200", "training.eval_interval", 200),
    "eval-iters": ("--eval-iters 3", "training.eval_iters", 3),
    "log-interval": ("--log-interval 7", "logging.log_interval", 7),
    "wandb-project": ("--wandb-project mine", "logging.wandb_project", "mine"),
}


def migrated(options: str) -> Migration:
    base = MODEL.replace("--train-iters 1000", "") if "--train-samples" in options else MODEL
    return migrate([*base.split(), *options.split()])


@pytest.mark.parametrize("name", CASES)
def test_an_option_becomes_a_setting_of_a_run_that_validates(name: str, tmp_path: Path) -> None:
    options, key, value = CASES[name]
    file = tmp_path / "run.yaml"
    file.write_text(as_yaml(migrated(options), origin="run.sh"))
    config = load_config(["--config", str(file)])
    validate(config, world_size=smallest_world_size(config.parallel))
    assert value_at(config, key) == value
    assert f"--{name}" in f"{MODEL} {options}"


def test_every_option_that_is_mapped_has_a_case() -> None:
    mapped = {name for name, option in ALL.items() if option.fate in ("key", "flag", "computed") and option.ours}
    assert mapped == set(CASES)


def test_options_name_keys_that_exist() -> None:
    groups = {path.rpartition(".")[0] for path in all_keys()}
    for name, option in ALL.items():
        first, *others = option.ours.split(", ") if option.ours else ["run_dir"]
        paths = [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]
        assert set(paths) <= set(all_keys()) | groups, name


@pytest.mark.parametrize("name", [name for name, option in ALL.items() if option.fate == "none"])
def test_what_there_is_nothing_for_is_listed_with_its_reason(name: str) -> None:
    assert f"--{name} 1: {ALL[name].note}" in migrated(f"--{name} 1").unmapped


@pytest.mark.parametrize("name", [name for name, option in ALL.items() if option.fate == "implied"])
def test_what_is_implied_is_listed_only_where_it_says_otherwise(name: str) -> None:
    option = ALL[name]
    holds, other = migrated(f"--{name} {next(iter(option.accepted), '')}"), migrated(f"--{name} other")
    assert not any(note.startswith(f"--{name}") for note in holds.unmapped)
    assert any(note.startswith(f"--{name}") for note in other.unmapped) == bool(option.accepted)


def test_what_a_script_leaves_to_megatrons_defaults_is_written_down() -> None:
    config = migrate(MODEL.replace("--lr-decay-style cosine", "").split())
    assert config.config().optimizer.adam_beta2 == 0.999
    assert config.config().optimizer.weight_decay == 0.01
    assert config.config().optimizer.min_lr_ratio == 0
    assert any("--lr-decay-style linear (Megatron-LM's default)" in note for note in config.unmapped)
    assert any("--hidden-dropout 0.1 (Megatron-LM's default)" in note for note in config.unmapped)
    assert set(DEFAULTS) <= set(ALL)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ("--no-such-thing 3", "--no-such-thing 3: not an option"),
        ("--fp16", "--fp16: training.precision is bf16"),
        ("--fp8-format hybrid --fp8-recipe mxfp8", "--fp8-recipe mxfp8"),
        ("--language-model-type nemotron5-hybrid-8b --ffn-hidden-size 512", "Mamba"),
        ("--vision-model-type radio", "--vision-model-type radio: it has several class tokens"),
        ("--vision-projection-type affine", "--vision-projection-type affine"),
        ("--img-w 224", "images are squares"),
        ("--num-experts 4 --moe-layer-freq 2", "--moe-layer-freq 2"),
        ("--moe-router-topk 2", "there are no experts without --num-experts"),
        ("--recompute-vision", "does nothing there"),
        ("--recompute-modules layernorm", "--recompute-modules layernorm"),
        ("--lr-decay-style WSD", "--lr-decay-style WSD"),
        ("--attention-dropout 0.2", "--attention-dropout 0.2"),
        ("--image-tag-type nvlm", "--image-tag-type nvlm"),
        ("--save out --load elsewhere", "mm1 convert import --source elsewhere"),
        ("--data-path blend.yaml", "mm1 data prepare"),
    ],
)
def test_what_cannot_be_mapped_is_listed_and_the_rest_is_a_run(options: str, note: str, tmp_path: Path) -> None:
    migration = migrated(options)
    assert any(note in line for line in migration.unmapped), migration.unmapped
    validate(migration.config(), world_size=smallest_world_size(migration.config().parallel))
    assert note in as_yaml(migration, origin="run.sh")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("tower", TOWERS)
def test_their_models_become_ours(language: str, tower: str) -> None:
    migration = migrated(f"--language-model-type {language} --vision-model-type {tower} --img-h 378 --img-w 378")
    config = migration.config()
    validate(config, world_size=1)
    assert config.model.decoder.ffn_hidden_size == LANGUAGES[language].ffn_hidden_size
    assert (config.model.vision.num_layers, config.model.connector.tokens_per_image) == (TOWERS[tower].num_layers, 729)


# --- the shell ---

SCRIPTS = {
    "one string of options": r"""
#!/bin/bash
DEBUG=0
if [[ $DEBUG -eq 1 ]]; then
    BZ=32; HD=0.0
    EXTRA=""
else
    BZ=256
    HD=0.1   # as published
    EXTRA="--use-te"
fi
if [[ -z $WORKSPACE ]]; then
    WORKSPACE="/data"
fi
OPTIONS=" \
    --num-layers 8 \
    --hidden-dropout ${HD} \
    --global-batch-size ${BZ} \
    ${EXTRA} \
    --save ${WORKSPACE}/out --language-model-type=mistral_7b
"
torchrun --nproc_per_node 8 examples/train.py ${OPTIONS}
""",
    "arrays, defaults and quotes": r"""
TP=${TP:-4}
: "a comment's quote"
MODEL_ARGS=(
    --tensor-model-parallel-size "$TP"   # the node's
    --tokenizer-model 'a $path with spaces/tokenizer.json'
)
MODEL_ARGS+=(--lr "1e-4" --special-tokens "<image>" \<img\>)
NONE=()
torchrun train.py "${MODEL_ARGS[@]}" "${NONE[@]}" "$UNSET" $UNSET --seed ${SEED-3} --name "x${UNSET:+y}z" 2>&1 | tee log
""",
    "a batch job": r"""
export BATCH=1
NAME="run"
if [ "$BATCH" == "0" ]; then
  NAME+="-interactive"
elif [[ $BATCH -eq 1 ]]; then
  NAME+="-batch"
else
  NAME+="-other"
fi
cmd="python -u src/train.py --save out/${NAME} \
  --seq-length 2048"
sh -c "${cmd}"
""",
    "nested conditions": r"""
A=2
if [[ $A -eq 1 ]]; then
  if [[ $A -ne 1 ]]; then B=1; else B=2; fi
else
  if [[ -n $A ]]; then B=3; fi
fi
python train.py --b $B
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_are_those_that_bash_passes(name: str, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    written = tmp_path / "arguments"
    for program in ("torchrun", "python"):
        file = tmp_path / program
        file.write_text(f"#!{bash}\nprintf '%s\\0' \"$@\" > {written}\n")
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run([bash, "-c", SCRIPTS[name]], check=True, env=environment, cwd=tmp_path)
    passed = written.read_text().split("\0")[:-1]
    after = next(position for position, word in enumerate(passed) if word.endswith("train.py")) + 1
    script = read_script(SCRIPTS[name], program="train.py", variables={})
    assert list(script.arguments) == passed[after:]
    assert script.unread == ()


def test_what_only_running_would_tell_is_reported() -> None:
    loop = "for i in 1 2; do\n  X=$i\ndone\nif grep -q a b; then C=1; else C=2; fi\n"
    text = f'{loop}python train.py --d "$(date)" --c $C --e $F\n'
    script = read_script(text, program="train.py", variables={})
    assert script.arguments[2:4] == ("--c", "2")
    assert [line.split(":")[0] for line in script.unread] == ["line 1", "line 4"]
    assert script.unset == ("F",)


def test_the_environment_is_given_by_hand() -> None:
    script = read_script("python train.py --lr $LR", program="train.py", variables={"LR": "1e-3"})
    assert script.arguments == ("--lr", "1e-3")


@pytest.mark.parametrize(
    ("text", "words"), [("python other.py", "runs no train.py"), ("A='x\npython train.py", "is not closed")]
)
def test_a_script_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_script(text, program="train.py", variables={})


# --- the command ---


def test_the_command_writes_yaml_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, output = tmp_path / "run.sh", tmp_path / "run.yaml"
    script.write_text(f'OPTIONS="{MODEL} --freeze-ViT --pixel-shuffle"\ntorchrun pretrain.py $OPTIONS --lr ${{LR}}\n')
    assert main(["config", "from-megatron", str(script), "--program", "pretrain.py", "--set", "LR=3e-5"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["optimizer"]["lr"] == 3e-5
    assert "# - --pixel-shuffle: no built-in connector does it" in printed
    arguments = ["--program", "pretrain.py", "--set", "LR=3e-5", "--output", str(output)]
    assert main(["config", "from-megatron", str(script), *arguments]) == 0
    assert output.read_text() == printed
    assert load_config(["--config", str(output)]).training.freeze == ("tower",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the script"),
        (["missing.sh"], "cannot read missing.sh"),
        (["{script}", "--set", "LR"], "write NAME=VALUE"),
        (["{script}", "--program", "other.py"], "runs no other.py"),
        (["{script}"], "--lr fast is no number"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "run.sh"
    script.write_text("python train.py --lr fast\n")
    assert main(["config", "from-megatron", *(word.format(script=script) for word in arguments)]) == USER_ERROR
    assert words in capsys.readouterr().err


def test_what_a_layout_lacks_is_said_in_front(tmp_path: Path) -> None:
    text = as_yaml(migrated("--tensor-model-parallel-size 3"), origin="run.sh")
    assert "# It cannot run as it is:\n# - " in text


def test_the_page_has_every_option() -> None:
    assert table() in (DOCS / "migrating.md").read_text()
