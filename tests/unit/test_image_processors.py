"""Image processors of transformers become settings of ours and ours theirs: the same pixels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_mm1.checkpoint.image_processors import DEFAULTS, export_image_processor, import_image_processor
from megatron_mm1.checkpoint.mm1_folder import MM1Checkpoint
from megatron_mm1.checkpoint.weights import open_weights
from megatron_mm1.cli import main
from megatron_mm1.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.geometry import Resize
from megatron_mm1.errors import UserError
from tests import pretrained
from tests.corpora import encoded
from tests.unit.test_images_preprocessing import opened

SIDE = 28
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
OTHERS = replace(VisionConfig(), image_size=SIDE, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
SQUARE, SHORTER = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
CROP: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "size": SHORTER, "crop_size": SQUARE}
BASE = ModelConfig(decoder=DecoderConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1))


def assert_same_pixels(vision: VisionConfig, theirs: Any) -> None:
    """Of images whose centres' margins are the same in both, within 2 of 255."""
    processor = ImageProcessor(vision.image_size, vision.image_mean, vision.image_std, mode=vision.image_resize)
    for size in ((40, 28), (28, 60), (36, 36), (72, 20)):
        data = encoded(size=size, seed=size[0])
        ours = processor([data])[0][0].numpy()
        expected = np.asarray(theirs(opened(data), return_tensors="np")["pixel_values"][0])
        assert ours.shape == expected.shape
        assert np.abs((ours - expected) * np.array(vision.image_std).reshape(3, 1, 1) * 255).max() <= 2.01


@pytest.mark.parametrize("mode", ["squash", "shorter_side_crop", "pad"])
def test_transformers_prepares_images_by_what_is_exported(mode: Resize, tmp_path: Path) -> None:
    vision = replace(OTHERS, image_resize=mode, image_mean=MEAN, image_std=STD)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(export_image_processor(vision)))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert_same_pixels(vision, theirs)
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/preprocessor_config.json").read_text())
    assert import_image_processor(again, OTHERS) == vision


@pytest.mark.parametrize(
    ("theirs", "mode"),
    [
        (CLIPImageProcessorPil(size=SHORTER, crop_size=SQUARE, image_mean=MEAN, image_std=STD), "shorter_side_crop"),
        (CLIPImageProcessorPil(size=SQUARE, do_center_crop=False), "squash"),
        (CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), "squash"),
        (SiglipImageProcessorPil(size=SQUARE), "squash"),
        (transformers.LlavaImageProcessor(size=SHORTER, crop_size=SQUARE, do_pad=True), "pad"),
        (transformers.LlavaImageProcessor(size=SQUARE, crop_size=SQUARE, do_pad=True), "pad"),
        (transformers.LlavaImageProcessor(size=SHORTER, crop_size=SQUARE), "shorter_side_crop"),
    ],
)
def test_images_are_prepared_as_transformers_does(theirs: Any, mode: Resize) -> None:
    vision = import_image_processor(theirs.to_dict(), OTHERS)
    assert vision.image_resize == mode
    assert_same_pixels(vision, theirs)


def test_old_files_have_numbers() -> None:
    """As openai/clip-vit-large-patch14-336 is published."""
    old = {
        "crop_size": 28,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "size": 28,
    }
    expected = replace(OTHERS, image_resize="shorter_side_crop", image_mean=MEAN, image_std=STD)
    assert import_image_processor(old, OTHERS) == expected


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_is_not_said_is_transformers_default(kind: str) -> None:
    theirs = getattr(transformers, f"{kind}ImageProcessor")().to_dict()
    bare = {"image_processor_type": f"{kind}ImageProcessor"}
    vision = replace(OTHERS, image_size=224)
    assert import_image_processor(bare, vision) == import_image_processor(theirs, vision)
    assert import_image_processor({**bare, "resample": None, "do_normalize": None}, vision).image_std == tuple(
        theirs["image_std"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "image processor PixtralImageProcessor: supported are"),
        ({"image_processor_type": None}, "image processor none: supported are those of CLIP, Llava, Siglip"),
        ({"size": {"shortest_edge": 32}}, r"size \{'shortest_edge': 32\}, .*: supported are squares of .* 28 px"),
        ({"crop_size": 24}, r"crop_size 24: supported are squares of the tower's 28 px, squashed, cut out or padded"),
        ({"do_center_crop": False}, "do_center_crop False"),
        ({"size": {"height": 28, "width": 14}}, r"size \{'height': 28, 'width': 14\}"),
        ({"resample": 2}, "resample 2: images are resized bicubically here, which is 3"),
        ({"do_resize": False}, "do_resize false"),
        ({"do_rescale": False}, "do_rescale false"),
        ({"do_normalize": False}, "do_normalize false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\]: images here have three channels"),
        ({"image_std": "abc"}, "image_std abc: images here have three channels"),
        ({"image_std": [1, 1, 0]}, r"image_std \[1, 1, 0\]: pixels are divided by it"),
    ],
)
def test_what_is_prepared_in_another_way_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_image_processor({**CROP, **change}, OTHERS)
    assert "without preprocessor_config.json (or processor_config.json) the weights" in str(caught.value)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(UserError) as caught:
        import_image_processor({**CROP, "resample": 2, "crop_size": 24}, OTHERS)
    assert len(str(caught.value).splitlines()) == 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**pretrained.TOWER))
    pretrained.randomize(tower)
    tower.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own", [None, CROP])
@pytest.mark.parametrize("whole", [None, {"processor_class": "X"}, {"image_processor": {**CROP, "image_mean": MEAN}}])
def test_a_folder_says_it_in_one_of_two_files(
    clip: Path, own: dict[str, Any] | None, whole: dict[str, Any] | None, tmp_path: Path
) -> None:
    """The processor's own file counts where it has an image processor, as in transformers."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip.iterdir():
        (folder / file.name).symlink_to(file)
    for name, content in (("preprocessor_config.json", own), ("processor_config.json", whole)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    assert open_weights(folder, base=BASE).model.vision.image_resize == "squash"  # weights alone
    vision = open_weights(folder, base=BASE, with_images=True).model.vision
    nested = whole is not None and "image_processor" in whole
    assert vision.image_resize == ("shorter_side_crop" if own or nested else "squash")
    assert vision.image_mean == (MEAN if nested else VisionConfig().image_mean)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "preprocessor_config.json is not JSON"),
        ("[]", "preprocessor_config.json holds no configuration"),
        (json.dumps({**CROP, "image_mean": 3}), "the configuration of this clip is damaged: TypeError"),
    ],
)
def test_a_damaged_file_is_named(clip: Path, content: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_weights(folder, base=BASE, with_images=True)
    open_weights(folder, base=BASE)


def test_only_llavas_image_processor_pads_to_squares() -> None:
    assert import_image_processor({**CROP, "do_pad": True}, OTHERS).image_resize == "shorter_side_crop"
    llava = {**CROP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    assert import_image_processor(llava, OTHERS).image_resize == "pad"


def test_options_outrank_a_folders_image_processor(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "preprocessor_config.json").write_text(json.dumps({**CROP, "image_mean": MEAN}))
    arguments = ["--source", folder, "--output", tmp_path / "out", "--preset", "mm1-tiny"]
    assert main(["convert", "import", *map(str, arguments), "--model.vision.image_resize", "pad"]) == 0
    vision = MM1Checkpoint(tmp_path / "out").metadata.mm1_config().model.vision
    assert (vision.image_resize, vision.image_mean) == ("pad", MEAN)
