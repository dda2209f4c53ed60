"""Images per second and core: decode, resize and normalise 640x480 JPEGs to 378 px, beside Pillow and numpy.

The two take turns, on one thread each, by the processor's time: another program on the machine slows both, not one.
"""

import io
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
from goals import Goal

SIDE = 378
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTH, HEIGHT = 640, 480


def photographs(count: int) -> list[bytes]:
    """Smooth pictures with a little noise, as JPEG: about 100 kB each, as photographs of their size have."""
    encoded = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        content = io.BytesIO()
        PIL.Image.fromarray(noisy).save(content, "JPEG", quality=90)
        encoded.append(content.getvalue())
    return encoded


def with_pillow(images: Sequence[bytes]) -> np.ndarray:
    """[N, 3, SIDE, SIDE] float32: one multiplication and one subtraction an image, in place."""
    std = np.array(STD, np.float32)
    scale, shift = 1 / (255 * std), np.array(MEAN, np.float32) / std
    pixels = np.empty((len(images), 3, SIDE, SIDE), np.float32)
    for target, data in zip(pixels, images, strict=True):
        picture = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        resized = np.asarray(picture.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC))
        target[...] = (resized * scale - shift).transpose(2, 0, 1)
    return pixels


def seconds(run: Callable[[], Any]) -> float:
    """Of the processor, over all threads of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(arguments: Namespace) -> tuple[dict[str, Any], list[Goal]]:
    """Settings and goals; `arguments` has images and rounds."""
    os.environ["DALI_NUM_THREADS"] = "1"  # before DALI is imported
    import torch

    from megatron_mm1.data.images import ImageProcessor

    torch.set_num_threads(1)
    images, processor = photographs(arguments.images), ImageProcessor(SIDE, MEAN, STD)
    ours, theirs = processor(images)[0].numpy(), with_pillow(images)  # both warm now
    difference = float((np.abs(ours - theirs) * np.array(STD).reshape(3, 1, 1)).max() * 255)
    pairs = [
        (seconds(lambda: processor(images)), seconds(lambda: with_pillow(images))) for _ in range(arguments.rounds)
    ]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    settings = {
        "images": f"{len(images)} JPEGs of {WIDTH}x{HEIGHT}, {sum(map(len, images)) // len(images)} bytes on average",
        "threads": "DALI 1, torch 1",
        "rounds": arguments.rounds,
        "images_per_second": f"ours {len(images) / medians[0]:.0f}, Pillow {len(images) / medians[1]:.0f}",
    }
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    return settings, [
        Goal("images_vs_pillow", ratio, "x", ">", 1.8),
        Goal("max_pixel_difference", difference, "of 255", "<", 2.5),
    ]
