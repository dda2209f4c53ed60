"""Squares as the published preprocessing makes them, random crops as Pillow cuts them, and the way over a device."""

import io
from collections.abc import Callable

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LlavaImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_mm1.data.batch import ImageGroup
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.augmentation import RandomResizedCrop
from megatron_mm1.data.images.device import DeviceProcessor, check_gpu_decoder
from megatron_mm1.data.images.geometry import Resize, resize
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.data.tiling import Tiling
from megatron_mm1.errors import UserError
from tests.corpora import encoded

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [(201, 150), (37, 211), (48, 48), (47, 49), (20, 13), (1, 1), (3, 77), (333, 64), (65, 66)]
CPU = torch.device("cpu")


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def group(images: int) -> ImageGroup:
    return ImageGroup(slots=torch.zeros(images, 1, dtype=torch.int64), height=48, width=48)


def by_open_clip(image: PIL.Image.Image, *, side: int, mode: str) -> np.ndarray:
    transform = open_clip.transform.image_transform(
        side, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation="bicubic"
    )
    return transform(image).numpy() * 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [48, 33])
@pytest.mark.parametrize(("mode", "theirs"), [("squash", "squash"), ("shorter_side_crop", "shortest")])
def test_squares_are_those_of_open_clip(size: tuple[int, int], side: int, mode: Resize, theirs: str) -> None:
    data = encoded("PNG", size=size)
    pixels, _ = ImageProcessor(side, (0, 0, 0), (1, 1, 1), mode=mode)([data])
    assert np.abs(pixels[0].numpy() * 255 - by_open_clip(opened(data), side=side, mode=theirs)).max() <= 2.01


@pytest.mark.parametrize("size", [(201, 150), (48, 48), (50, 48), (37, 211), (100, 49)])
def test_centre_is_that_of_transformers(size: tuple[int, int]) -> None:
    """transformers rounds the margin down, where CLIP rounds halves to even; these margins are the same in both."""
    data = encoded("PNG", size=size)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48, image_mean=MEAN, image_std=STD)
    expected = theirs(opened(data), return_tensors="np")["pixel_values"][0]
    pixels, _ = ImageProcessor(48, MEAN, STD, mode="shorter_side_crop")([data])
    assert np.abs((pixels[0].numpy() - expected) * np.array(STD).reshape(3, 1, 1) * 255).max() <= 2.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [48, 33])
def test_padded_squares_are_those_of_transformers_llava(size: tuple[int, int], side: int) -> None:
    data = encoded("PNG", size=size)
    theirs = LlavaImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=MEAN,
        image_std=STD,
        do_pad=True,
    )
    expected = theirs(opened(data), return_tensors="pt")["pixel_values"]
    pixels, _ = ImageProcessor(side, MEAN, STD, mode="pad")([data])
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=1e-6)


LENGTHS = st.integers(1, 200)


@given(LENGTHS, LENGTHS, LENGTHS, LENGTHS, st.booleans(), st.integers(0, 100))
@example(129, 77, 70, 47, False, 0)  # 59 and 30 px shorter: Pillow takes the width first
@example(138, 57, 33, 21, False, 0)  # 105 and 36: the height
@example(129, 77, 70, 47, True, 0)
@example(138, 57, 33, 21, True, 0)
def test_resizes_the_sharpest_edges_as_pillow(
    old_height: int, old_width: int, height: int, width: int, floats: bool, seed: int
) -> None:
    """Black and white noise: what overshoots on the way shows where it is clamped."""
    noise = np.random.default_rng(seed).integers(0, 2, (old_height, old_width, 3), dtype=np.uint8) * 255
    expected = PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)
    image = torch.from_numpy(noise).permute(2, 0, 1)
    resized = resize(image.float() if floats else image, height=height, width=width)
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("mode", ["shorter_side_crop", "pad"])
def test_very_long_image_is_not_enlarged_as_a_whole(mode: Resize) -> None:
    data = encoded("PNG", size=(9_999, 1))
    pixels, _ = ImageProcessor(378, (0, 0, 0), (1, 1, 1), mode=mode)([data])
    assert pixels.shape == (1, 3, 378, 378)


def test_normalising_later_gives_the_same_bits() -> None:
    images = [encoded("PNG", seed=seed) for seed in range(3)]
    processor = ImageProcessor(48, MEAN, STD)
    later = processor.fill(group(3), [EncodedImage(data) for data in images])
    assert later.pixels is not None
    assert later.pixels.dtype == torch.uint8
    assert torch.equal(later.to(CPU).pixels, processor(images)[0])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 15))
def test_crop_lies_in_the_image(height: int, width: int, sequence: int, image: int) -> None:
    crop = RandomResizedCrop(0.3, 0.8, seed=1)
    top, left, h, w = crop.box(height, width, sequence=sequence, image=image)
    assert top >= 0
    assert left >= 0
    assert 0 < h <= height - top
    assert 0 < w <= width - left


def test_crops_have_the_areas_and_shapes_asked_for() -> None:
    crop = RandomResizedCrop(0.2, 0.6, seed=3)
    boxes = np.array([crop.box(1000, 1000, sequence=n, image=0) for n in range(2000)])
    areas, ratios = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert 0.199 < areas.min() < 0.21
    assert 0.59 < areas.max() < 0.601
    assert abs(areas.mean() - 0.4) < 0.01
    assert 0.745 < ratios.min() < ratios.max() < 1.34
    assert abs(boxes[:, 0] / (1000 - boxes[:, 2]) - 0.5).mean() == pytest.approx(0.25, abs=0.01)


def test_crop_never_changes() -> None:
    """Numbers of this version: another one would train on other pixels."""
    assert RandomResizedCrop(0.2, 0.6, seed=3).box(480, 640, sequence=5, image=2) == (7, 69, 426, 397)


@pytest.mark.parametrize("size", SIZES)
def test_cropped_image_is_what_pillow_crops_and_resizes(size: tuple[int, int]) -> None:
    data, crop = encoded("PNG", size=size), RandomResizedCrop(0.1, 0.5, seed=0)
    box = crop.box(size[1], size[0], sequence=9, image=1)
    image = EncodedImage(data, crop=lambda height, width: crop.box(height, width, sequence=9, image=1))
    top, left, height, width = box
    expected = opened(data).crop((left, top, left + width, top + height)).resize((48, 48), PIL.Image.Resampling.BICUBIC)
    pixels = ImageProcessor(48, MEAN, STD).fill(group(1), [image]).pixels
    assert np.abs(pixels[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("kind", ["none", "dynamic"])
@pytest.mark.parametrize("mode", ["squash", "shorter_side_crop", "pad"])
def test_device_way_gives_the_pixels_of_the_cpu_way(kind: str, mode: Resize) -> None:
    """Formats that DALI decodes and those it does not, damaged and missing ones among them."""
    images = [
        EncodedImage(encoded("JPEG", size=(90, 61)), grid=(1, 1)),
        EncodedImage(encoded("GIF", mode="P"), grid=(1, 1)),
        EncodedImage(None),
        EncodedImage(b"junk"),
        EncodedImage(encoded("PNG", size=(40, 60)), crop=lambda height, width: (3, 4, height // 2, width // 2)),
    ]
    tiling = None
    if kind == "dynamic":
        tiling = Tiling("dynamic", side=48, max_tiles=6)
        images.append(EncodedImage(encoded("JPEG", size=(300, 100)), grid=(1, 3)))
    processor = ImageProcessor(48, (0, 0, 0), (1, 1, 1), mode=mode, tiling=tiling)
    count = sum(map(processor.num_tiles, images))
    on_host = processor.fill(group(count), images).to(CPU)
    on_device = DeviceProcessor(processor).fill(group(count), images).to(CPU)
    assert on_device.encoded is None
    assert on_device.pixels.shape == on_host.pixels.shape
    assert (on_device.pixels - on_host.pixels).abs().max() * 255 <= 2.01


def test_gpu_decoder_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check: Callable[[], None] = check_gpu_decoder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"data.image_decoder is gpu, and this process sees no CUDA device"):
        check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check()
