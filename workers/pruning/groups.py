"""Which vision patches make one token, as the host's projector pools them."""

from __future__ import annotations

import torch
from torch import Tensor


def blocks(rows: int, columns: int, side: int) -> Tensor:
    """Return the patches of each token where patches lie row by row and side x side blocks are pooled.

    Returns (n, side * side) int64, n = rows / side * columns / side, tokens row by row.
    """
    if rows % side or columns % side:
        raise ValueError(f"a grid of {rows} x {columns} patches has no whole {side} x {side} blocks")
    patches = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
    return patches.permute(0, 2, 1, 3).reshape(-1, side * side)


def runs(patches: int, length: int) -> Tensor:
    """Return the patches of each token where the encoder's order already puts a block's patches together.

    Returns (n, length) int64, n = patches / length.
    """
    if patches % length:
        raise ValueError(f"{patches} patches are no whole runs of {length}")
    return torch.arange(patches).view(-1, length)


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Average `values` (S, N, ...) over each token's patches; returns (S, n, ...)."""
    return values[:, groups.to(values.device)].mean(dim=2)
