"""What the published MedPruner code computes where ours differs; used by the golden tests alone.

Four differences of meaning: every slice is encoded; float32 sums decide the cut; a target becomes itself plus
the mean of its tokens; a dropped slice keeps its token 0. (A fifth, the grouping of patches, is the host's.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.pruning.tokens import (
    Reduced,
    contextual_count,
    contextual_targets,
    highest_until,
    merge,
    nearest_target,
    places_of,
)


def reduce_tokens(
    received: Tensor,
    keys: Tensor,
    features: Tensor,
    *,
    tau: float,
    temperature: float,
    contextual_fraction: float,
) -> Reduced:
    """The token stage of every slice, shapes as in tokens.reduce_tokens.

    Where the reference crashes (fewer tokens left over than targets) all tokens are kept.
    """
    dominant = highest_until(torch.softmax(received / temperature, dim=-1), tau)
    count = contextual_count(received.shape[1], contextual_fraction)
    targets = contextual_targets(dominant, count)
    places = places_of(targets, count)
    merged_into = nearest_target(keys, dominant, targets, places)
    return Reduced(
        features=merge(features, merged_into, places, count_target=False),
        kept=dominant | targets,
        merged_into=merged_into,
        scores=received,
    )


def token_mask(slices_kept: Tensor, tokens_kept: Tensor) -> Tensor:
    """Slice stage and token stage together: a dropped slice keeps token 0 if the token stage does.

    slices_kept: (S,) bool; tokens_kept: (S, n) bool. Returns (S, n) bool.
    """
    first = torch.zeros_like(tokens_kept)
    first[:, 0] = True
    return tokens_kept & (slices_kept.unsqueeze(1) | first)
