"""A page of sequences as training sees them: images in place, examples apart, trained tokens coloured."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from string import Template

import numpy as np
import PIL.Image
import torch

from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.images import ImageProcessor, decode
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.data.inspect.mixture import cost
from megatron_mm1.data.order import KeyedPermutation
from megatron_mm1.data.plan import TrainingData, packing_limits
from megatron_mm1.data.source import Piece
from megatron_mm1.data.tokenizer import Tokenizer

_SHOWN_SIDE = 160
"""px; pictures on the page are no larger."""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8886; --trained: #9bd49b66; --bar: #4a7fb5; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
.bar { height: .6rem; background: var(--line); border-radius: .3rem; overflow: hidden; }
.bar div { height: 100%; background: var(--bar); }
.note { opacity: .75; font-size: .85rem; margin: .3rem 0; overflow-wrap: anywhere; }
section { border-left: .3rem solid var(--bar); padding: .2rem .7rem; margin: .7rem 0; }
section:nth-of-type(even) { border-color: #b5734a; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.trained { background: var(--trained); border-radius: .2rem; }
.control { font: .75rem ui-monospace, monospace; border: 1px solid var(--line); border-radius: .3rem; }
img { max-width: ${side}px; width: 30vw; vertical-align: middle; margin: .2rem; border-radius: .2rem; }
.damaged { display: inline-block; padding: 1rem; border: 1px dashed; }
</style></head><body>
<h1>$title</h1>
<p class="note"><span class="trained">Tokens on this ground</span> are trained; all others are only read. Each bar at
the left is an example, and attention does not cross from one to another.</p>
$sequences
</body></html>
""")


def page(config: MM1Config, data: TrainingData, tokenizer: Tokenizer, indices: Sequence[int]) -> str:
    """HTML of the run's sequences `indices`, which needs nothing else to be shown."""
    processor = ImageProcessor.of(config)
    sequences = [_sequence(config, data, tokenizer, processor, index) for index in indices]
    return _PAGE.substitute(
        title=html.escape(f"{config.name}: {len(sequences)} of its training sequences"),
        side=_SHOWN_SIDE,
        sequences="\n".join(sequences),
    )


def random_indices(config: MM1Config, *, count: int, seed: int) -> list[int]:
    """Sequences of the whole run, each once, in order; the same seed gives the same ones."""
    total = BatchSizes.of(config.training).sequences_before(config.training.train_iters)
    return sorted(KeyedPermutation(f"{seed}/page", total)(np.arange(min(count, total))).tolist())


def _sequence(
    config: MM1Config, data: TrainingData, tokenizer: Tokenizer, processor: ImageProcessor, index: int
) -> str:
    limits = packing_limits(config, tokenizer)
    wanted = data.plan.sequence(index)
    text_only = config.data.text_only
    costs = [cost(data.sources, limits, piece, text_only=text_only) for piece in wanted]
    positions, images = sum(length for length, _ in costs), sum(tiles for _, tiles in costs)
    step = BatchSizes.of(config.training).step_of(index) + 1
    heading = f"Sequence {index:,}, step {step:,}"
    images_of_limit = f"{images} of {limits.max_images} images"
    fill = f"{positions:,} of {limits.seq_length:,} positions, {images_of_limit}, {len(wanted)} examples"
    sections = []
    for of, piece in zip(wanted, data.sources.read(wanted), strict=True):
        source = data.sources[of.source]
        count = int(source.num_images(np.array([of.document]))[0])
        seen = _without_images(piece, tokenizer.image_id) if text_only else piece
        shown = "".join(_parts(seen, tokenizer, processor, images_in_document=count, usable=None not in piece.images))
        note = f"{data.sources.names[of.source]} · {source.key(of.document)} · tokens {of.start:,} to {of.stop:,}"
        sections.append(
            f'<section><div class="note">{html.escape(note)}</div><div class="text">{shown}</div></section>'
        )
    bar = f'<div class="bar"><div style="width: {100 * positions / limits.seq_length:.1f}%"></div></div>'
    return f'<article><h2>{heading}</h2>{bar}<p class="note">{fill}</p>{"".join(sections)}</article>'


def _without_images(piece: Piece, image_id: int) -> Piece:
    is_text = piece.tokens != image_id
    return Piece(tokens=piece.tokens[is_text], trained=piece.trained[is_text], images=(), sizes=())


def _parts(
    piece: Piece, tokenizer: Tokenizer, processor: ImageProcessor, *, images_in_document: int, usable: bool
) -> Iterator[str]:
    """HTML of a piece, run by run of tokens of one kind; where it is not usable, nothing of it is trained."""
    symbols = {token: symbol for symbol, token in tokenizer.controls.items()}
    grids = iter(processor.tiling.grids(np.array(piece.sizes).reshape(-1, 2), num_images=images_in_document).tolist())
    images = iter(piece.images)
    is_target = piece.trained & usable
    is_target[:1] = False  # nothing predicts the first token
    tokens = list(zip(piece.tokens.tolist(), is_target.tolist(), strict=True))
    for (is_control, trained), run in groupby(tokens, key=lambda token: (token[0] in symbols, token[1])):
        ids = [token for token, _ in run]
        if not is_control:
            yield _marked(html.escape(tokenizer.decode(ids)), trained)
            continue
        for token in ids:
            if token == tokenizer.image_id:
                yield _pictures(next(images), next(grids), processor)
            else:
                yield _marked(f'<span class="control">{html.escape(symbols[token])}</span>', trained)


def _marked(shown: str, trained: bool) -> str:
    return f'<span class="trained">{shown}</span>' if trained else shown


def _pictures(data: bytes | None, grid: list[int], processor: ImageProcessor) -> str:
    """The tiles of an image as the tower gets them, made smaller."""
    (pixels,) = decode([data])
    if pixels is None:
        return '<span class="damaged">damaged image: its example is not trained</span>'
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)
    tiles = processor.view(rgb, EncodedImage(data, (grid[0], grid[1])))
    return "".join(_picture(tile.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()) for tile in tiles)


def _picture(pixels: np.ndarray) -> str:
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'
