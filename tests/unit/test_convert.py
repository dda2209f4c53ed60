"""`mm1 convert`: what each conversion keeps, changes and refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_mm1.checkpoint import format
from megatron_mm1.checkpoint.compare import compare
from megatron_mm1.checkpoint.dist_checkpoint import COMMON_STATE, DistCheckpoint
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint, write_mm1
from megatron_mm1.checkpoint.tensors import PlanSource, StateDict, collect, copied
from megatron_mm1.checkpoint.tensors import in_pieces as split
from megatron_mm1.checkpoint.vocabulary import TABLES, with_vocabulary
from megatron_mm1.cli import main
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.serialization import to_dict
from tests.weights import (
    assert_same,
    in_pieces,
    metadata,
    read_all,
    save_random_model,
    saved,
    sharded_state,
    tensors_of_every_kind,
)

SMALL = ["--model.decoder.num_layers", "2", "--model.vision.num_layers", "1", "--expert_model_parallel_size", "1"]
CONFIG = load_config(["--preset", "mm1-tiny-moe", *SMALL])
FC1 = "language_model.decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
EXTRA_STATE = "tower.blocks.0._extra_state/shard_0_1"
RNG = "rng_state/shard_0.0_1.1"


@pytest.fixture(scope="module")
def written_by_megatron(groups, tmp_path_factory):
    """(model, its distributed checkpoint)."""
    folder = tmp_path_factory.mktemp("megatron") / "checkpoint"
    return save_random_model(CONFIG, folder, groups=groups), folder


@pytest.fixture(scope="module")
def weights(written_by_megatron):
    return read_all(DistCheckpoint(written_by_megatron[1]))


@pytest.fixture(scope="module")
def optimizer_state(weights):
    generator = torch.Generator().manual_seed(7)
    return {
        f"optimizer.state.{kind}.{name}": torch.randn(tensor.shape, generator=generator)
        for kind in ("exp_avg", "exp_avg_sq")
        for name, tensor in weights.items()
    }


def training_checkpoint(folder, weights, state, *, config=CONFIG):
    objects = {
        COMMON_STATE: saved([{"optimizer": {"step": torch.tensor(41.0)}, "scheduler": {"num_steps": 41}}]),
        EXTRA_STATE: saved([str(folder)]),
        RNG: saved([torch.arange(5)]),
    }
    about = metadata(config=to_dict(config), iteration=41, has_training_state=True, plan_fingerprint="p", world_size=2)
    write_mm1(folder, in_pieces({**weights, **state}, 50), about, objects=objects)
    return folder


@pytest.fixture
def trained(tmp_path, weights, optimizer_state):
    return training_checkpoint(tmp_path / "trained", weights, optimizer_state)


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


# the format


def test_megatron_core_reads_what_we_write(written_by_megatron, groups, tmp_path):
    model, folder = written_by_megatron
    source = DistCheckpoint(folder)
    plan = [split(source, name, num_pieces=3) for name in source.tensors]
    path = write_mm1(tmp_path, plan, metadata(config=to_dict(CONFIG)))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = {"model": sharded_state(model, groups=groups)}
    loaded = dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"], strict=False)
    assert_same({name: tensor for name, tensor in model.state_dict().items() if tensor is not None}, expected)


# reshard


def test_reshard_keeps_weights_and_training_state(trained, tmp_path):
    output = tmp_path / "new"
    layout = ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-model-parallel-size", 2]
    assert convert("reshard", "--checkpoint", trained, "--output", output, "--pieces", 3, *layout) == 0
    before, after = MM1Checkpoint(trained), MM1Checkpoint(output)
    assert_same(read_all(after), read_all(before))
    assert after.read_object(COMMON_STATE) == before.read_object(COMMON_STATE)
    assert after.read_object(EXTRA_STATE) == before.read_object(EXTRA_STATE)
    assert RNG in before.objects and RNG not in after.objects
    parallel = after.metadata.mm1_config().parallel
    assert (parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size) == (2, 2)
    assert replace(after.metadata, config={}) == replace(before.metadata, config={}, world_size=None)
    assert after.num_chunks(FC1) == 3
    assert (output / "latest").read_text() == "step-00000041\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-model-parallel-size", 3], "num_attention_heads 4"),
        (["--expert-model-parallel-size", 3], "num_moe_experts 4"),
        (["--lr", 1], "only keys of parallel can be changed here"),
        (["--preset", "mm1-tiny"], "only keys of parallel can be changed here"),
    ],
)
def test_reshard_refuses_a_layout_that_cannot_be(trained, tmp_path, capsys, options, message):
    assert convert("reshard", "--checkpoint", trained, "--output", tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_optimizer_state_of_the_first_format_is_left_behind(trained, tmp_path):
    [path] = trained.glob("step-*")
    fields = json.loads((path / "mm1.json").read_text()) | {"format_version": 1}
    (path / "mm1.json").write_text(json.dumps(fields))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["mm1.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert convert("reshard", "--checkpoint", trained, "--output", tmp_path / "new") == 0
    after = MM1Checkpoint(tmp_path / "new")
    assert (after.metadata.format_version, after.metadata.has_training_state) == (format.FORMAT_VERSION, False)
    assert not [name for name in after.tensors if name.startswith("optimizer")]


@pytest.mark.parametrize("command", ["reshard", "export", "verify"])
def test_nothing_comes_of_a_damaged_checkpoint(imported, tmp_path, capsys, command):
    damaged, output = shutil.copytree(imported, tmp_path / "damaged"), tmp_path / "new"
    [file] = damaged.rglob("*.distcp")
    data = bytearray(file.read_bytes())
    source = MM1Checkpoint(damaged)
    norm = source.read("language_model.decoder.final_norm.weight").view(torch.uint8).numpy().tobytes()
    data[data.index(norm)] ^= 1
    file.write_bytes(data)
    arguments = {
        "reshard": ["--checkpoint", damaged, "--output", output],
        "export": ["--checkpoint", damaged, "--output", output, "--family", "llama"],
        "verify": [imported, damaged],
    }
    assert convert(command, *arguments[command]) == 2
    assert "is not what was written (SHA-256 differs)" in capsys.readouterr().err
    assert not output.exists() or not [path for path in output.rglob("*") if path.is_file()]


# take and replace


@pytest.mark.parametrize(("component", "prefix"), format.COMPONENTS.items())
def test_take(trained, tmp_path, weights, component, prefix):
    output = tmp_path / "new"
    assert convert("take", "--checkpoint", trained, "--component", component, "--output", output) == 0
    after = MM1Checkpoint(output)
    assert_same(read_all(after), {name: tensor for name, tensor in weights.items() if name.startswith(prefix)})
    assert (after.metadata.components, after.metadata.has_training_state) == ((component,), False)
    assert convert("take", "--checkpoint", output, "--component", "tower", "--output", tmp_path / "newer") == (
        0 if component == "tower" else 2
    )


def doubled(tensors):
    return {name: tensor * 2 for name, tensor in tensors.items()}


def test_replace_takes_optimizer_state_along(trained, tmp_path, weights, optimizer_state):
    other = training_checkpoint(tmp_path / "other", doubled(weights), doubled(optimizer_state))
    options = ["--component", "tower", "--from", other, "--output", tmp_path / "new"]
    assert convert("replace", "--checkpoint", trained, *options) == 0
    after = MM1Checkpoint(tmp_path / "new")
    both = {**weights, **optimizer_state}
    expected = {name: tensor * 2 if "tower." in name else tensor for name, tensor in both.items()}
    assert_same(read_all(after), expected)
    assert after.metadata == replace(MM1Checkpoint(trained).metadata, world_size=None)
    assert after.read_object(COMMON_STATE) == MM1Checkpoint(trained).read_object(COMMON_STATE)
    assert after.read_object(EXTRA_STATE) == MM1Checkpoint(other).read_object(EXTRA_STATE)


def test_replace_without_optimizer_state_for_a_trained_part_keeps_weights_only(trained, tmp_path, weights, capsys):
    other = tmp_path / "other"
    write_mm1(other, in_pieces(doubled(weights), 99), metadata(config=to_dict(CONFIG)))
    options = ["--component", "connector", "--from", other, "--output", tmp_path / "new"]
    assert convert("replace", "--checkpoint", trained, *options) == 0
    assert "only weights are kept" in capsys.readouterr().out
    after = MM1Checkpoint(tmp_path / "new")
    expected = {name: tensor * 2 if name.startswith("connector.") else tensor for name, tensor in weights.items()}
    assert_same(read_all(after), expected)
    assert (after.metadata.has_training_state, after.metadata.iteration) == (False, 0)


def test_replacing_a_frozen_part_keeps_the_training_state(tmp_path, weights, optimizer_state):
    decoder_only = {name: tensor for name, tensor in optimizer_state.items() if ".language_model." in name}
    base = training_checkpoint(tmp_path / "base", weights, decoder_only)
    other = tmp_path / "other"
    write_mm1(other, in_pieces(doubled(weights), 99), metadata(config=to_dict(CONFIG)))
    options = ["--component", "tower", "--from", other, "--output", tmp_path / "new"]
    assert convert("replace", "--checkpoint", base, *options) == 0
    after = MM1Checkpoint(tmp_path / "new")
    assert after.metadata.has_training_state
    assert {name for name in after.tensors if name.startswith("optimizer")} == set(decoder_only)


def test_a_part_that_does_not_fit_is_refused(trained, tmp_path, weights, capsys):
    model = CONFIG.model
    wider = replace(CONFIG, model=replace(model, vision=replace(model.vision, hidden_size=256, image_size=96)))
    other = tmp_path / "other"
    write_mm1(other, in_pieces(weights, 99), metadata(config=to_dict(wider)))
    options = ["--component", "tower", "--from", other, "--output", tmp_path / "new"]
    assert convert("replace", "--checkpoint", trained, *options) == 2
    message = capsys.readouterr().err
    assert "vision.hidden_size is 256" in message and "patches is 64" in message
    assert not (tmp_path / "new").exists()


# import and export


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(state dict, folder) of transformers' own writing, in several files."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return _random(LlamaForCausalLM(config).bfloat16(), folder), folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=24, patch_size=6
    )
    return _random(CLIPVisionModel(config), folder), folder


def _random(model, folder):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size="20kB")
    return dict(model.state_dict())


PRESET = ["--preset", "mm1-tiny", "--model.vision.num_layers", "1"]


@pytest.fixture(scope="module")
def imported(llama, clip, tmp_path_factory):
    output = tmp_path_factory.mktemp("imported") / "out"
    assert convert("import", "--source", llama[1], "--source", clip[1], "--output", output, *PRESET) == 0
    return output


def test_import_combines_parts(imported):
    checkpoint = MM1Checkpoint(imported)
    assert checkpoint.metadata.components == ("tower", "decoder")
    assert (checkpoint.metadata.has_training_state, checkpoint.metadata.iteration) == (False, 0)
    model = checkpoint.metadata.mm1_config().model
    assert (model.decoder.hidden_size, model.vision.image_size, model.connector.num_layers) == (32, 24, 1)
    embedding = checkpoint.tensors["language_model.embedding.word_embeddings.weight"]
    assert (embedding.shape, embedding.dtype) == ((256, 32), torch.bfloat16)


@pytest.mark.parametrize(("pieces", "rows"), [(200, 200), (206, 256), (256, 256), (257, 384)])
def test_a_vocabulary_grows_to_its_tokenizer(imported, pieces, rows):
    """To a size without padding, by rows of zeros; the rest stays."""
    before = MM1Checkpoint(imported)
    model = before.metadata.mm1_config().model
    assert model.decoder.vocab_size == 200
    grown, plan = with_vocabulary(model, [copied(before, name) for name in before.tensors], vocab_size=pieces)
    assert replace(grown, decoder=replace(grown.decoder, vocab_size=200)) == model and grown.decoder.vocab_size == rows
    after = collect(plan)
    for table in TABLES:
        assert after[table].shape == (max(rows, 256), 32)
        assert torch.equal(after[table][:256], before.read(table)) and not after[table][200:].any()
    assert_same(
        {name: tensor[:256] for name, tensor in after.items()}, {name: before.read(name)[:256] for name in after}
    )


@pytest.mark.parametrize(("family", "shards"), [("llama", True), ("llama", False), ("clip", False)])
def test_export_gives_back_what_was_imported(imported, tmp_path, request, family, shards):
    state, original = request.getfixturevalue(family)
    output = tmp_path / "out"
    options = ["--max-shard-gb", 2e-5] if shards else []
    assert convert("export", "--checkpoint", imported, "--family", family, "--output", output, *options) == 0
    assert (output / "preprocessor_config.json").is_file() == (family == "clip")
    assert len(list(output.glob("*.safetensors"))) > 1 if shards else (output / "model.safetensors").is_file()
    model_class = {"llama": LlamaForCausalLM, "clip": CLIPVisionModel}[family]
    loaded, report = model_class.from_pretrained(output, output_loading_info=True, dtype="auto")
    assert not any(report.values())
    assert_same(dict(loaded.state_dict()), state)
    component = {"llama": "decoder", "clip": "tower"}[family]
    for folder in (imported, original):
        assert convert("verify", folder, output, "--component", component) == 0


def test_chat_templates_are_for_folders_that_have_them(imported, tmp_path, capsys):
    output = tmp_path / "out"
    assert convert("export", "--checkpoint", imported, "--family", "clip", "--output", output, "--chat") != 0
    assert "--chat and --chat-template are for --family transformers only, not for clip" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("command", ["import", "export", "reshard", "take", "upcycle", "replace"])
def test_a_dry_run_prints_and_writes_nothing(imported, llama, tmp_path, capsys, command):
    dense = {"import": ["--source", llama[1], *PRESET], "export": ["--family", "llama"]}
    dense |= {"upcycle": ["--num-moe-experts", 4, "--moe-layer-freq", 2], "take": ["--component", "decoder"]}
    dense["replace"] = ["--component", "decoder", "--from", llama[1]]
    checkpoint = [] if command == "import" else ["--checkpoint", imported]
    output = tmp_path / "new"
    assert convert(command, *checkpoint, *dense.get(command, []), "--dry-run", "--output", output) == 0
    assert not output.exists()
    printed = capsys.readouterr().out
    names = {"export": "model.layers.1.self_attn.k_proj.weight", "upcycle": "mlp.experts.experts.linear_fc1.weight"}
    assert names.get(command, "language_model.decoder.layers.2.self_attention.linear_qkv.weight") in printed
    assert "nothing was written" in printed
    assert convert(command, *checkpoint, *dense.get(command, []), "--dry-run") == 0


def test_upcycle_makes_a_checkpoint_of_weights(imported, tmp_path):
    options = ["--num-moe-experts", 4, "--moe-layer-freq", 2, "--moe-router-topk", 2]
    assert convert("upcycle", "--checkpoint", imported, "--output", tmp_path / "moe", *options) == 0
    after, before = MM1Checkpoint(tmp_path / "moe"), MM1Checkpoint(imported)
    assert after.metadata.mm1_config().model.moe.num_moe_experts == 4
    for expert in after.read(FC1):
        assert torch.equal(expert, before.read("language_model.decoder.layers.3.mlp.linear_fc1.weight"))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["llama", "llama"], "hold a decoder: name one of them"),
        (["pickled"], "convert them to safetensors first"),
        (["checkpoint"], "is an MM1 checkpoint already"),
        (["nothing"], "no checkpoint at"),
        (["other"], "cannot be imported"),
    ],
)
def test_import_refuses(imported, llama, tmp_path, capsys, sources, message):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(llama[1] / "config.json", pickled)
    torch.save(llama[0], pickled / "pytorch_model.bin")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({"a": torch.ones(1)}, other / "model.safetensors")
    folders = {"llama": llama[1], "checkpoint": imported}
    options = [argument for name in sources for argument in ("--source", folders.get(name, tmp_path / name))]
    assert convert("import", *options, "--output", tmp_path / "new", *PRESET) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_export_refuses_what_it_does_not_know(imported, tmp_path, capsys):
    assert convert("export", "--checkpoint", imported, "--family", "lama", "--output", tmp_path / "new") == 2
    assert "use one of llama, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["take", "--checkpoint", "a", "--component", "tower"], ["verify", "a", "b", "--lr", "1"]]
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(arguments):
    with pytest.raises(SystemExit) as error:
        convert(*arguments)
    assert error.value.code == 2


# verify and inspect


def test_verify_of_any_two_formats(trained, tmp_path, weights, optimizer_state, capsys):
    assert convert("reshard", "--checkpoint", trained, "--output", tmp_path / "new", "--pieces", 4) == 0
    assert convert("verify", trained, tmp_path / "new") == 0
    assert "no differences" in capsys.readouterr().out
    state = {**optimizer_state, f"optimizer.state.exp_avg.{FC1}": optimizer_state[f"optimizer.state.exp_avg.{FC1}"] + 1}
    other = training_checkpoint(tmp_path / "other", weights, state)
    assert convert("verify", trained, other) == 1
    assert f"optimizer.state.exp_avg.{FC1}: " in capsys.readouterr().out
    assert convert("verify", trained, other, "--component", "decoder") == 0
    assert convert("verify", trained, other, "--tolerance", "1.01") == 0


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance", "difference"),
    [
        (ONES, ONES.clone(), 0, None),
        (ONES, None, 0, "missing in B (A: [3, 4] float32)"),
        (None, ONES, 0, "missing in A (B: [3, 4] float32)"),
        (ONES, torch.ones(4, 3), 0, "shape [3, 4] in A, [4, 3] in B"),
        (ONES, ONES.half(), 0, "type torch.float32 in A, torch.float16 in B"),
        (ONES, ONES.half(), 1e-9, None),
        (ONES, ONES + torch.eye(3, 4) / 4, 0, "3 of 12 elements differ, by 0.25 at most"),
        (ONES, ONES + torch.eye(3, 4) / 4, 0.25, None),
        (ONES, ONES + torch.eye(3, 4) / 4, 0.24, "3 of 12 elements differ, by 0.25 at most"),
        (ONES * torch.nan, ONES * torch.nan, 0, None),
        (ONES * torch.inf, ONES * torch.inf, 0, None),
        (ONES * torch.inf, -ONES * torch.inf, 1, "12 of 12 elements differ, by inf at most"),
        (ONES, ONES * torch.nan, 1e9, "12 of 12 elements differ, by inf at most"),
        (torch.tensor(1), torch.tensor(2), 0, "1 of 1 elements differ, by 1 at most"),
        (torch.empty(0, 3), torch.empty(0, 3), 0, None),
    ],
)
def test_differences(monkeypatch, ours, theirs, tolerance, difference):
    monkeypatch.setattr("megatron_mm1.checkpoint.compare._BLOCK", 8)  # two rows at a time
    sources = [StateDict({} if tensor is None else {"t": tensor}) for tensor in (ours, theirs)]
    found = [str(difference) for difference in compare(*sources, tolerance=tolerance)]
    assert found == ([] if difference is None else [f"t: {difference}"])


def test_a_plan_is_a_source(weights):
    state = {**weights, **tensors_of_every_kind()}
    source = PlanSource(in_pieces(state, 3))
    assert_same(collect([copied(source, name) for name in source.tensors]), state)
    for rows in (slice(0, 0), slice(1, 2), slice(2, 5), slice(0, 4)):
        assert torch.equal(source.read(FC1, rows), state[FC1][rows])


def test_inspect(trained, imported, llama, written_by_megatron, capsys):
    for folder, expected in {
        trained: ["step: 41 (24 sequences)", "holds: tower, connector, decoder, training state", "optimizer, tower"],
        imported: ["holds: tower, decoder", "bfloat16", "layout: tensor_model_parallel_size 2"],
        llama[1]: ["model_type: llama", "model.layers", "bfloat16"],
        written_by_megatron[1]: ["of another program", "language_model.decoder.layers"],
    }.items():
        assert convert("inspect", folder) == 0
        printed = capsys.readouterr().out
        for text in expected:
            assert text in printed, folder
    numbers = sum(tensor.numel() for path in llama[1].glob("*.safetensors") for tensor in load_file(path).values())
    assert convert("inspect", llama[1]) == 0
    assert f"{numbers:,}" in capsys.readouterr().out
