"""Kept inputs -> tower and projector, a few at a time -> features, and what attention each token received."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.pruning.attention import received_attention
from workers.pruning.finite import require_finite
from workers.pruning.groups import group_mean
from workers.vlm.tap import watching

# pixels of some inputs -> (k, n, c) and the deepstack features, each (k, n, c)
Features = Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The inputs as the processor gives them.

    pixels: (I, ...) float32 on the CPU, one row per input, in the tower's order.
    patch_rows, patch_columns: of one input, before the projector pools them.
    """

    pixels: Tensor
    patch_rows: int
    patch_columns: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """K inputs after the tower and the projector.

    features: (K, n, c); deepstack: further features per token, each (K, n, c).
    received: (K, n) and keys: (K, n, d), float32, of the last vision layer; None when nobody watched.
    """

    features: Tensor
    deepstack: tuple[Tensor, ...]
    received: Tensor | None
    keys: Tensor | None


def encode(
    features: Features, inputs: Tensor, layer: nn.Module, groups: Tensor, *, scored: bool, at_once: int
) -> Encoded:
    """Run the tower over some inputs, `at_once` of them at a time, and score their patches where asked to.

    inputs: (K, ...) on the CPU; layer: the attention that is watched; groups: (n, patches per token).
    NotFinite when a feature is.
    """
    parts: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    received: list[Tensor] = []
    mean_keys: list[Tensor] = []

    def score(queries: Tensor, keys: Tensor, scale: float) -> None:
        received.append(group_mean(received_attention(queries, keys, scale=scale), groups))
        mean_keys.append(group_mean(keys.float().mean(dim=1), groups))

    for pixels in inputs.split(at_once):  # type: ignore[no-untyped-call]
        if scored:
            with watching(layer, score):
                parts.append(features(pixels))
        else:
            parts.append(features(pixels))
    whole = torch.cat([part[0] for part in parts])
    deepstack = tuple(torch.cat(deep) for deep in zip(*(part[1] for part in parts), strict=True))
    require_finite(whole, "visual features")
    for deep in deepstack:
        require_finite(deep, "deepstack features")
    return Encoded(
        features=whole,
        deepstack=deepstack,
        received=torch.cat(received) if scored else None,
        keys=torch.cat(mean_keys) if scored else None,
    )
