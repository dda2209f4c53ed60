"""Images decoded on the GPU (DALI on nvJPEG) are those of the CPU."""

import numpy as np
import pytest
import torch

from megatron_mm1.data.batch import ImageGroup
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.decoding import decode, load_dali
from megatron_mm1.data.images.device import DeviceProcessor, decode_on
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.parallel.device import device
from tests.corpora import encoded
from tests.gpu.marks import DALI

pytestmark = DALI

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
KINDS = {
    "JPEG": dict(format="JPEG", quality=90),
    "JPEG without subsampling": dict(format="JPEG", quality=95, subsampling=0),
    "grey JPEG": dict(format="JPEG", mode="L"),
    "progressive JPEG": dict(format="JPEG", progressive=True),
    "PNG": dict(format="PNG"),
    "PNG with transparency": dict(format="PNG", mode="RGBA"),
    "palette PNG": dict(format="PNG", mode="P"),
}
SIZES = [(640, 480), (37, 211), (378, 378), (1, 1)]
LOSSY, LOSSLESS = 8, 0
"""Of 255. JPEG leaves the cosine transform's rounding and the interpolation of chroma to the decoder."""
MEAN_LOSSY = 1.0


def images(kind: str) -> list[bytes]:
    return [encoded(size=size, seed=seed, **KINDS[kind]) for seed, size in enumerate(SIZES)]


def assert_near(ours: np.ndarray, theirs: np.ndarray, *, lossy: bool) -> None:
    difference = np.abs(ours.astype(float) - theirs.astype(float))
    assert ours.shape == theirs.shape
    assert difference.max() <= (LOSSY if lossy else LOSSLESS)
    assert difference.mean() <= MEAN_LOSSY


@pytest.mark.parametrize("kind", KINDS)
def test_pixels(kind):
    files = images(kind)
    for ours, theirs in zip(decode_on(device(), files), decode(files), strict=True):
        assert ours.device.type == device().type
        assert_near(ours.cpu().numpy(), theirs, lossy="JPEG" in kind)


def test_the_gpu_itself_decodes():
    """`decode_on` goes over the CPU for what DALI does not take: not for a plain JPEG."""
    dali = load_dali()
    data = dali.as_batch([np.frombuffer(encoded("JPEG", size=(640, 480)), np.uint8)])
    batch = dali.decoders.image(data, device="gpu")
    assert torch.from_dlpack(next(iter(batch.tensors))).device.type == "cuda"


@pytest.mark.parametrize("mode", ["squash", "shorter_side_crop"])
def test_squares(mode):
    """Decoded, resized and normalised on the device, beside the same on the host; what is damaged is grey."""
    files = [data for kind in ("JPEG", "PNG") for data in images(kind)]
    sources = [EncodedImage(data) for data in [*files, None]]
    processor = ImageProcessor(378, MEAN, STD, mode=mode)
    group = ImageGroup(slots=torch.zeros(len(sources), 1, dtype=torch.int64), height=378, width=378)
    on_host = processor.fill(group, sources).to(torch.device("cpu")).pixels
    on_device = DeviceProcessor(processor).fill(group, sources).to(device()).pixels
    levels = (on_device.cpu() - on_host).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.max() <= LOSSY + 2  # Pillow's resizing of bytes, and ours of floats
    assert levels[-1].max() < 0.01
