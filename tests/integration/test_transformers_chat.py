"""Tiles and conversations of an exported folder in transformers: the same tokens, pixels and answers as ours."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.ExifTags
import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor

from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_mm1.checkpoint.transformers_export import data_settings
from megatron_mm1.cli import main
from megatron_mm1.config import MM1Config, ModelConfig
from megatron_mm1.data.chat import Chat, ChatTemplate
from megatron_mm1.data.image_tokens import tiling_of
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.prompts import PromptEncoder
from megatron_mm1.inference.requests import Generation, GenerationRequest, Prompt
from tests import transformers_runner
from tests.conftest import REPOSITORY
from tests.corpora import encoded, small_tokenizer
from tests.integration.test_transformers_export import (
    CLIP,
    DENSE,
    by_transformers,
    config_of,
    connector,
    random_model,
    stored,
    write,
)

MODEL = ModelConfig(vision=CLIP, connector=connector("average_pool"), decoder=DENSE)
VICUNA = Chat(REPOSITORY / "examples/llava15/vicuna_v1.jinja")
DYNAMIC = dict(image_tiling="dynamic", min_image_tiles=4, max_image_tiles=6, tile_indicators=True)
CASES: dict[str, tuple[str, dict[str, Any], Chat | None]] = {
    "overview and crops": ("pad", dict(image_tiling="overview_and_crops"), Chat()),
    "dynamic, indicators": ("squash", DYNAMIC, VICUNA),
    "whole": ("squash", {}, Chat()),
    "centre, no template": ("shorter_side_crop", {}, None),
}
"""How an image becomes a square, how it is cut, and the template."""
ASKED = [name for name, (_, _, chat) in CASES.items() if chat is not None]

A, B, C = (Image(encoded(size=size, seed=seed)) for seed, size in enumerate(((70, 40), (96, 30), (33, 65))))
ON_ITS_SIDE = PIL.Image.Exif()
ON_ITS_SIDE[PIL.ExifTags.Base.Orientation] = 6
TURNED = Image(encoded("JPEG", size=(90, 30), exif=ON_ITS_SIDE))
TURNED_TIFF = Image(encoded("TIFF", size=(90, 30), exif=ON_ITS_SIDE))
PROMPTS: list[Prompt] = [
    (Text("what is <|end|> of </s> <|user|>?"),),
    (A, Text("red square")),  # ends with a piece: pipelines look for the decoded prompt in all that is decoded
    (Text("a "), A, Text(" of "), B),
    (A, B, Text(" and "), C, Text("blue square in")),
    (TURNED, Text("the circle")),
    (TURNED_TIFF, Text("the circle")),
]
"""The fourth has too many images to be cut dynamically."""


@dataclass
class Case:
    """A model's configuration, its engine, and what transformers made of its folder."""

    config: MM1Config
    tokenizer: Tokenizer
    engine: Engine
    template: ChatTemplate | None
    folder: Path
    theirs: dict[str, Any]

    def encoded(self, prompt: Prompt, *, chat: bool) -> tuple[list[int], Tensor | None]:
        """Ids and pixels of a prompt, by itself or as what a user says."""
        encode = PromptEncoder.of(self.config, self.tokenizer, template=self.template if chat else None)
        made = encode(prompt, new_tokens=1)
        if not made.images:
            return list(made.tokens), None
        processor = ImageProcessor.of(self.config)
        tiles, _ = processor.tiles([EncodedImage(image.data, grid=image.key.grid) for image in made.images])
        return list(made.tokens), processor.normalization(tiles)


@pytest.fixture(scope="module")
def cases(groups, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("exported")
    tokenizer = small_tokenizer(root)
    made, requests = {}, []
    for number, (name, (resize, data, chat)) in enumerate(CASES.items()):
        config = config_of(replace(MODEL, vision=replace(CLIP, image_resize=resize)), tokenizer)
        config = replace(config, data=replace(config.data, seq_length=512, max_images_per_sequence=40, **data))
        model, folder = random_model(config, groups), root / f"model{number}"
        write(folder, config, stored(model, groups), chat=chat)
        template = None if chat is None else chat.open(tokenizer)
        engine = Engine(config, model, tokenizer, pg_collection=groups, chat=template)
        made[name] = Case(config, tokenizer, engine, template, folder, {})
        requests.append({"folder": str(folder), "contents": [contents(prompt) for prompt in PROMPTS]})
    for case, theirs in zip(made.values(), by_transformers(root, requests), strict=True):
        case.theirs = theirs
    return made


def contents(prompt: Prompt) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": part.data}
        for part in prompt
    ]


@pytest.mark.parametrize(("name", "kind"), [*((name, "plain") for name in CASES), *((name, "chat") for name in ASKED)])
def test_prompts_become_our_ids_and_our_pixels(cases: dict[str, Case], name: str, kind: str) -> None:
    case = cases[name]
    for prompt, (ids, pixels) in zip(PROMPTS, case.theirs[kind], strict=True):
        expected_ids, expected = case.encoded(prompt, chat=kind == "chat")
        assert ids == expected_ids
        assert (pixels is None) == (expected is None)
        if pixels is not None:
            decoders = 2.01 / 255 / min(case.config.model.vision.image_std)  # of JPEG may differ by 2 of 255
            torch.testing.assert_close(pixels, expected, atol=decoders if TURNED in prompt else 0, rtol=0)


def test_the_cases_cut_images(cases: dict[str, Case]) -> None:
    """Two images into several tiles each, of three only by the fixed grid."""
    tiles = {
        name: [0 if pixels is None else len(pixels) for _, pixels in case.theirs["plain"]]
        for name, case in cases.items()
    }
    assert tiles["overview and crops"] == [0, 5, 10, 15, 5, 5]
    assert tiles["whole"] == tiles["centre, no template"] == [0, 1, 2, 3, 1, 1]
    tiling = tiling_of(cases["dynamic, indicators"].config)
    first, second, turned = tiling.tiles_of([(40, 70), (30, 96), (90, 30)], 1).tolist()
    assert (
        tiles["dynamic, indicators"] == [0, first, first + second, 3, turned, turned] and min(first, second, turned) > 3
    )
    assert tiling.grids([(90, 30)], 1).tolist() == [[4, 1]]  # 3 x 1 would do


@pytest.mark.parametrize("name", ASKED)
def test_conversations_are_answered_as_by_our_engine(cases: dict[str, Case], name: str) -> None:
    """All of them padded on the left; each answer up to the end of the turn."""
    case = cases[name]
    requests = [GenerationRequest(prompt=one, max_new_tokens=transformers_runner.NEW_TOKENS) for one in PROMPTS]
    expected = [one for one in case.engine.generate(requests) if isinstance(one, Generation)]
    assert case.theirs["together"] == [list(one.token_ids) for one in expected]
    assert len({one.token_ids for one in expected}) > 1


def test_a_pipeline_says_the_answer(cases: dict[str, Case]) -> None:
    for name in ("whole", "overview and crops"):
        said, expected = cases[name].theirs["piped"]
        assert said == expected != ""


@pytest.mark.parametrize(
    ("name", "options", "tiling"),
    [
        ("dynamic, indicators", [], ("dynamic", 4, 6, True)),
        ("overview and crops", [], ("overview_and_crops", 1, 4, False)),
        ("dynamic, indicators", ["--image_tiling", "none"], ("none", 4, 6, False)),
    ],
)
def test_imported_again_it_takes_images_and_text_as_before(
    cases: dict[str, Case], name: str, options: list[str], tiling: tuple[Any, ...], tmp_path: Path
) -> None:
    """Its tokenizer and its tiles are the folder's, whatever the preset has; options outrank it."""
    case, output = cases[name], tmp_path / "back"
    arguments = ["--source", case.folder, "--output", output, "--preset", "mm1-tiny", *options]
    assert main(["convert", "import", *map(str, arguments)]) == 0
    metadata = MM1Checkpoint(output).metadata
    data = metadata.mm1_config().data
    assert data.tokenizer == str(case.folder / "tokenizer.model")
    assert metadata.tokenizer_fingerprint == case.tokenizer.fingerprint
    assert (data.image_tiling, data.min_image_tiles, data.max_image_tiles, data.tile_indicators) == tiling
    assert (data.seq_length, data.max_images_per_sequence, data.text_only) == (512, 510 // 4, False)


def test_saved_again_by_transformers_it_keeps_its_tiles(cases: dict[str, Case], tmp_path: Path) -> None:
    """In a file where it has them all."""
    case, again = cases["dynamic, indicators"], tmp_path / "again"
    shutil.copytree(case.folder, again)
    (again / "preprocessor_config.json").unlink()
    AutoProcessor.from_pretrained(case.folder, trust_remote_code=True).save_pretrained(again)
    assert not (again / "preprocessor_config.json").exists()
    folder = SafetensorsFolder(again)
    assert data_settings(folder, case.config.model) == {
        **data_settings(SafetensorsFolder(case.folder), case.config.model),
        "tokenizer": str(again / "tokenizer.model"),
    }


def test_a_folder_from_before_there_were_tiles_has_none(cases: dict[str, Case], tmp_path: Path) -> None:
    case, old = cases["dynamic, indicators"], tmp_path / "old"
    shutil.copytree(case.folder, old)
    images = json.loads((old / "preprocessor_config.json").read_text())
    kept = {name: value for name, value in images.items() if "til" not in name}
    (old / "preprocessor_config.json").write_text(json.dumps(kept))
    (old / "processor_config.json").write_text("{}")
    settings = data_settings(SafetensorsFolder(old), case.config.model)
    assert (settings["image_tiling"], settings["tile_indicators"], settings["text_only"]) == ("none", False, False)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ({"image_tiling": "weird"}, [], "data.image_tiling"),
        ({}, ["--max_images_per_sequence", "3"], "max_images_per_sequence is 3"),
    ],
)
def test_settings_that_cannot_be_are_no_checkpoint(
    cases: dict[str, Case], images: dict[str, Any], options: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    folder, output = tmp_path / "folder", tmp_path / "back"
    shutil.copytree(cases["dynamic, indicators"].folder, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **images}))
    arguments = ["--source", folder, "--output", output, "--preset", "mm1-tiny", *options]
    assert main(["convert", "import", *map(str, arguments)]) != 0
    assert message in capsys.readouterr().err and not output.exists()


def test_a_conversation_can_be_read(cases: dict[str, Case]) -> None:
    assert cases["whole"].theirs["read"] == "<|user|>what is <|end|> of </s> <|user|>?<|end|><|assistant|>"
    assert cases["dynamic, indicators"].theirs["read"].endswith("USER: what is <|end|> of </s> <|user|>? ASSISTANT:")
