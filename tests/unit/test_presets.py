"""Every preset as it was reviewed, its size beside the paper's. `UPDATE_GOLDEN=1 pytest` rewrites the snapshots."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm1.config.derived import head_dim
from megatron_mm1.config.laws import PUBLISHED_SIZES, peak_learning_rate
from megatron_mm1.config.loading import to_yaml
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError
from megatron_mm1.planning.parameters import count_parameters
from megatron_mm1.planning.report import human, presets_table

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_snapshot(name: str) -> None:
    path, text = GOLDEN / f"{name}.yaml", to_yaml(preset(name))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_there_is_no_snapshot_without_a_preset() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        # 3 x 512: rounding the FFN up to a multiple of 256 adds 8 %.
        ("mm1-9m", "10.2M"),
        ("mm1-85m", "85.0M"),
        ("mm1-302m", "308M"),
        ("mm1-1.2b", "1.23B"),
        ("mm1-3b", "2.94B"),
        ("mm1-7b", "6.48B"),
        ("mm1-30b", "29.9B"),
        ("mm1-3b-moe", "64.8B"),
        ("mm1-7b-moe", "46.9B"),
    ],
)
def test_decoder_has_the_papers_size(name: str, computed: str) -> None:
    published, what = PUBLISHED_SIZES[name]
    counts = count_parameters(preset(name).model)
    print(
        f"{name}: decoder {human(counts.non_embedding)}, in all {human(counts.total)}; paper {human(published)} {what}"
    )
    number, factor = float(computed[:-1]), {"M": 1e6, "B": 1e9}[computed[-1]]
    assert counts.non_embedding == pytest.approx(number * factor, rel=0.005)
    assert counts.non_embedding == pytest.approx(published, rel=0.09 if name == "mm1-9m" else 0.03)


@pytest.mark.parametrize(("name", "computed"), [("llava15-7b", 6_738_415_616), ("llava15-13b", 13_015_864_320)])
def test_decoder_of_llava15_is_llama_2(name: str, computed: int) -> None:
    """The parameters that transformers counts in Llama-2's configurations of these sizes."""
    counts = count_parameters(preset(name).model)
    assert counts.embedding + counts.decoder + counts.output == computed


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("mm1") and "tiny" not in name])
def test_used_learning_rate_is_near_the_law(name: str) -> None:
    model = preset(name.removesuffix("-moe")).model.decoder
    law = peak_learning_rate(12 * model.num_layers * model.hidden_size**2)
    assert preset(name).optimizer.lr == pytest.approx(law, rel=0.12)
    assert preset(name).optimizer.connector_lr == 8e-5


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_on_its_own_number_of_processes(name: str) -> None:
    validate(preset(name), world_size=2 if "tiny" in name else 8)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_30b_splits_over_a_node_in_widths_that_are_multiples_of_32(tensor_parallel: int) -> None:
    config = preset("mm1-30b")
    config = replace(config, parallel=replace(config.parallel, tensor_model_parallel_size=tensor_parallel))
    validate(config, world_size=8)
    decoder = config.model.decoder
    for width in (decoder.hidden_size, decoder.ffn_hidden_size, decoder.num_attention_heads * head_dim(decoder)):
        assert width % (32 * tensor_parallel) == 0


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mm1-30b'"):
        preset("mm1-30")


def test_table_has_every_preset_beside_the_papers_size() -> None:
    lines = {line.split()[0]: line for line in presets_table().splitlines()[1:] if line}
    assert set(PRESETS) <= set(lines)
    assert "29.95B" in lines["mm1-30b"]
    published = {
        "mm1-9m": "9.4M non-embedding",
        "mm1-85m": "85M non-embedding",
        "mm1-302m": "302M non-embedding",
        "mm1-1.2b": "1.2B non-embedding",
        "mm1-3b": "2.9B non-embedding",
        "mm1-7b": "6.4B non-embedding",
        "mm1-30b": "30B non-embedding",
        "mm1-3b-moe": "64B total",
        "mm1-7b-moe": "47B total",
    }
    assert {name: " ".join(lines[name].split()[6:]) for name in published} == published
