"""`mm1 convert resize`: the model for larger images computes at once what the old one does with them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint, write_mm1
from megatron_mm1.checkpoint.resize import resize
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.cli import main
from megatron_mm1.config import ConnectorConfig, MM1Config
from megatron_mm1.config.serialization import to_dict
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.training.resume import check_resumable
from tests.canonical import load_canonical
from tests.upcycling import DENSE, dense_model
from tests.weights import in_pieces, metadata, read_all

CONNECTORS = {
    "c_abstractor": ConnectorConfig(connector="c_abstractor", tokens_per_image=4, hidden_size=16, num_layers=1),
    "average_pool": ConnectorConfig(connector="average_pool", tokens_per_image=4),
    "attention_pool": ConnectorConfig(
        connector="attention_pool", tokens_per_image=4, hidden_size=16, num_attention_heads=2
    ),
}


def with_connector(connector: ConnectorConfig, *, class_token: bool = True) -> MM1Config:
    vision = replace(DENSE.model.vision, image_size=32, class_token=class_token)
    return replace(DENSE, model=replace(DENSE.model, connector=connector, vision=vision))


def start_from(about, config: MM1Config) -> None:
    check_resumable(about, config, tokenizer_fingerprint=about.tokenizer_fingerprint, weights_only=True)


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("image_size", [16, 40, 64])
def test_features_are_those_of_the_old_model_at_the_new_size(groups, name, class_token, image_size):
    config = with_connector(CONNECTORS[name], class_token=class_token)
    before, state = dense_model(config, groups)
    model, plan = resize(config.model, image_size, StateDict(state))
    after = MM1Model(replace(config, model=model), backend="local", pg_collection=groups)
    load_canonical(after, collect(plan), groups)
    pixels = torch.randn(3, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(after.encode(pixels), before.encode(pixels), atol=1e-6, rtol=0)


def test_only_positions_change_and_only_weights_are_taken(groups):
    _, state = dense_model(with_connector(CONNECTORS["c_abstractor"]), groups)
    model, plan = resize(
        with_connector(CONNECTORS["c_abstractor"]).model,
        64,
        StateDict({**state, "optimizer.state.exp_avg.tower.class_token": torch.ones(16)}),
    )
    tensors = collect(plan)
    changed = {name for name in tensors if not torch.equal(tensors[name], state[name])}
    assert set(tensors) == set(state)
    assert changed == {"tower.position_embeddings", "connector.position_embeddings"}
    assert tensors["tower.position_embeddings"].shape == (1 + 64, 16)
    assert torch.equal(tensors["tower.position_embeddings"][0], state["tower.position_embeddings"][0])
    assert model.vision.image_size == 64 and model.decoder == DENSE.model.decoder


def test_llavas_connector_makes_a_token_of_each_new_patch(groups):
    _, state = dense_model(DENSE, groups)
    model, _ = resize(DENSE.model, 32, StateDict(state))
    assert model.connector.tokens_per_image == 16


@pytest.mark.parametrize(
    ("change", "image_size", "error"),
    [
        (lambda state: state, 33, ConfigError),
        (lambda state: state | {"tower.position_embeddings": torch.zeros(5, 17)[:4]}, 32, UserError),
    ],
)
def test_what_cannot_be_resampled_is_refused(groups, change, image_size, error):
    _, state = dense_model(DENSE, groups)
    with pytest.raises(error, match=r"patch|has shape \(4, 17\)"):
        resize(DENSE.model, image_size, StateDict(change(state)))


def test_a_tower_of_ones_own_is_refused():
    own = replace(DENSE.model, vision=replace(DENSE.model.vision, tower="mine:Tower"))
    with pytest.raises(UserError, match=r"this one is mine:Tower"):
        resize(own, 32, StateDict({}))


def test_the_command_writes_a_checkpoint_to_fine_tune_from(groups, tmp_path):
    config = with_connector(CONNECTORS["c_abstractor"])
    _, state = dense_model(config, groups)
    before, after = tmp_path / "before", tmp_path / "after"
    write_mm1(before, in_pieces(state, 3), metadata(config=to_dict(config), iteration=7, has_training_state=True))
    assert main(["convert", "resize", "--checkpoint", str(before), "--image-size", "64", "--output", str(after)]) == 0
    checkpoint = MM1Checkpoint(after)
    found = read_all(checkpoint)
    expected: dict[str, Tensor] = collect(resize(config.model, 64, StateDict(state))[1])
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    about = checkpoint.metadata
    assert about.mm1_config().model.vision.image_size == 64
    assert (about.iteration, about.has_training_state) == (0, False)
    with pytest.raises(UserError, match=r"image_size was 32 and is 64.*by mm1 convert resize"):
        start_from(MM1Checkpoint(before).metadata, about.mm1_config())
    start_from(about, about.mm1_config())
    assert "image_size: 64" in (after / "config.yaml").read_text()
