"""Learned position embeddings of an image grid, for other grids than the one they were made for."""

import torch
from torch import Tensor


def interpolate_positions(
    positions: Tensor, *, from_grid: tuple[int, int], to_grid: tuple[int, int], prefix_tokens: int = 0
) -> Tensor:
    """Resample position embeddings to another grid: bicubic with antialiasing, as MM1 does for higher resolutions [P].

    Computed in float32, since neighbouring positions differ by less than bfloat16 resolves. Differentiable.

    Args:
        positions: [prefix_tokens + from_h * from_w, C], rows of the grid one after the other.
        from_grid, to_grid: (height, width) in patches.
        prefix_tokens: positions in front of the grid's (a class token's), kept as they are.

    Returns:
        [prefix_tokens + to_h * to_w, C], dtype of `positions`; `positions` itself where the grids are equal.
    """
    if from_grid == to_grid:
        return positions
    prefix, patches = positions[:prefix_tokens], positions[prefix_tokens:]
    image = patches.float().unflatten(0, from_grid).permute(2, 0, 1).unsqueeze(0)  # [1, C, h, w]
    image = torch.nn.functional.interpolate(image, size=to_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, image[0].flatten(1).T.to(positions.dtype)])
