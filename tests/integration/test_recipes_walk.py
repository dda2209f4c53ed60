"""docs/recipes.md from raw files to a fine-tuned model: its own commands, run in order, and what each leaves behind."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.data.chat import OWN_TEMPLATE
from megatron_mm1.data.tokenizer import CHAT_SYMBOLS, open_tokenizer
from tests.conftest import REPOSITORY, shell_environment

PAGE, SECTION = REPOSITORY / "docs/recipes.md", "From raw files to a fine-tuned model"
NAMES = [
    "folder",
    "tokenizer",
    "prepared",
    "configured",
    "pretrained",
    "continued",
    "tuned",
    "tiles",
    "asked",
    "exported",
]
"""Of the section's blocks of commands, in their order."""

pytestmark = pytest.mark.demo


def blocks() -> list[str]:
    """The commands of the section."""
    section = re.search(rf"^## {SECTION}\n(.*?)^## ", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    return re.findall(r"^```bash\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Walk:
    """The folder that the commands ran in, and what each block printed."""

    folder: Path
    printed: dict[str, str]

    def follow(self, names: list[str]) -> None:
        """Run these blocks, one shell each; the first that fails ends it."""
        environment = {**shell_environment(), "PYTHONPATH": str(REPOSITORY)}
        for name in names:
            block = blocks()[NAMES.index(name)]
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block],
                cwd=self.folder.parent if name == "folder" else self.folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{name}:\n{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            self.printed[name] = done.stdout


@pytest.fixture(scope="module")
def prepared(demo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The way up to prepared data, in a stand-in for the repository."""
    root = tmp_path_factory.mktemp("repository")
    for name in (".cache", "tools", "examples"):
        (root / name).symlink_to(REPOSITORY / name)
    walk = Walk(root / "walk", {})
    walk.follow(NAMES[:3])
    return walk


@pytest.fixture(scope="module")
def walk(prepared: Walk) -> Walk:
    """The whole way."""
    prepared.follow(NAMES[3:])
    return prepared


def config_of(walk: Walk, run: str):
    metadata = read_metadata(find_checkpoint(walk.folder / "runs" / run))
    config = metadata.mm1_config()
    assert metadata.iteration == config.training.train_iters
    return config


def test_the_names_are_of_all_blocks() -> None:
    assert len(blocks()) == len(NAMES)


def test_the_tokenizer_has_the_symbols_of_conversations(prepared: Walk) -> None:
    tokenizer = open_tokenizer(prepared.folder / "tokenizer.model")
    assert tokenizer.vocab_size == 2000 and set(CHAT_SYMBOLS) <= set(tokenizer.controls)


@pytest.mark.parametrize(("name", "documents"), [("captions", 1405), ("interleaved", 32), ("text", 1235)])
def test_every_raw_record_was_prepared(prepared: Walk, name: str, documents: int) -> None:
    assert records(prepared, name) == {"read": documents, "written": documents, "rejected": {}}
    assert f"data/{name}: 1 parts" in prepared.printed["prepared"]


def records(walk: Walk, name: str) -> dict[str, Any]:
    return json.loads((walk.folder / "data" / name / "manifest.json").read_text())["records"]


@pytest.mark.slow
def test_the_configuration_can_be_looked_at_before_training(walk: Walk) -> None:
    assert "hidden_size: 128" in (walk.folder / "whole.yaml").read_text()
    assert "<html" in (walk.folder / "sequences.html").read_text()
    assert "captions" in walk.printed["configured"] and "GiB" in walk.printed["configured"]


@pytest.mark.slow
def test_pre_training_is_validated_and_goes_on_with_another_mixture(walk: Walk) -> None:
    lines = [json.loads(line) for line in walk.printed["pretrained"].splitlines() if line.startswith("{")]
    assert [line["iteration"] for line in lines] == [0, 2, 4]
    assert all("captions, images exchanged" in line for line in lines)
    shares = {
        run: [source.weight for source in config_of(walk, run).data.sources] for run in ("pretrained", "continued")
    }
    assert shares == {"pretrained": [0.45, 0.45, 0.1], "continued": [0.5, 0.1, 0.4]}


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_and_is_the_recipe(walk: Walk) -> None:
    assert records(walk, "instructions") == {"read": 200, "written": 200, "rejected": {}}
    tuned, tiles = config_of(walk, "tuned"), config_of(walk, "tuned-tiles")
    for config in (tuned, tiles):
        assert [source.path for source in config.data.sources] == ["data/instructions"]
        assert (config.optimizer.optimizer, config.optimizer.min_lr_ratio) == ("adafactor", 0.0)
    assert (tuned.checkpoint.load, tiles.checkpoint.load) == ("runs/continued", "start/96px")
    assert (tuned.model.vision.image_size, tuned.data.image_tiling) == (48, "none")
    assert (tiles.model.vision.image_size, tiles.data.image_tiling) == (96, "overview_and_crops")


@pytest.mark.slow
def test_the_models_answer(walk: Walk) -> None:
    assert "noto-1f436.png: " in walk.printed["asked"]
    results = json.loads((walk.folder / "runs/tuned/questions/results.json").read_text())
    assert results["few_shot"]["chat"] == "the template of this program"
    items = (walk.folder / "runs/tuned/questions/items.jsonl").read_text().splitlines()
    assert len(items) == 8


@pytest.mark.slow
def test_the_model_leaves_as_it_is(walk: Walk) -> None:
    assert (walk.folder / "exported/chat_template.jinja").read_text() == OWN_TEMPLATE
    assert "<html" in (walk.folder / "runs/tuned/report.html").read_text()
    assert "demo_questions" in (walk.folder / "runs/tuned/report.html").read_text()
