"""The token stage: the smallest set of tokens that holds tau of the attention, and what the rest becomes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.pruning.finite import require_finite

ROUNDING = 1e-12  # of a float64 sum of shares: ten shares of 0.05 reach 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """S slices of n tokens after the token stage.

    features: (S, n, c); contextual targets hold what was merged into them. Rows not kept are as they came.
    kept: (S, n) bool, dominant tokens and contextual targets.
    merged_into: (S, n) int64, the target of the same slice that carries this token; -1 where not merged.
    scores: (S, n) float32, the attention received.
    """

    features: Tensor
    kept: Tensor
    merged_into: Tensor
    scores: Tensor


def reduce_tokens(
    received: Tensor,
    keys: Tensor,
    features: Tensor,
    *,
    tau: float,
    temperature: float,
    contextual_fraction: float,
) -> Reduced:
    """Keep the dominant tokens, merge the rest into a few contextual ones.

    received: (S, n) float32 and keys: (S, n, d), both averaged over the patches that the projector pools.
    features: (S, n, c), projected.
    tau in (0, 1]: share of softmax(received / temperature) to be held; 1 keeps every token.
    contextual_fraction in [0, 1): targets per slice as a share of n, at least one; 0 drops the rest unmerged.
    NotFinite when a score, key or feature is NaN or infinite.
    Source: MedPruner (arXiv 2603.11625), token stage; the merge is a mean over the target and its tokens.
    """
    for values, name in ((received, "attention received"), (keys, "keys"), (features, "features")):
        require_finite(values, name)
    dominant = dominant_tokens(received, tau=tau, temperature=temperature)
    count = contextual_count(received.shape[1], contextual_fraction)
    targets = contextual_targets(dominant, count)
    places = places_of(targets, count)
    merged_into = nearest_target(keys, dominant, targets, places)
    return Reduced(
        features=merge(features, merged_into, places, count_target=True),
        kept=dominant | targets,
        merged_into=merged_into,
        scores=received.float(),
    )


def keep_every_token(features: Tensor) -> Reduced:
    """The identity: every token is kept, none is scored."""
    slices, tokens = features.shape[:2]
    return Reduced(
        features=features,
        kept=torch.ones(slices, tokens, dtype=torch.bool, device=features.device),
        merged_into=torch.full((slices, tokens), -1, dtype=torch.int64, device=features.device),
        scores=torch.full((slices, tokens), torch.nan, dtype=torch.float32, device=features.device),
    )


def dominant_tokens(received: Tensor, *, tau: float, temperature: float) -> Tensor:
    """Return the smallest set per slice whose share of softmax(received / temperature) reaches tau.

    received: (S, n). Equal scores: the lower index first. Returns (S, n) bool.
    In float64, so that neither the device nor the order of the sum moves the cut.
    """
    if tau >= 1:  # no rounded sum decides what `all of it` means
        return torch.ones_like(received, dtype=torch.bool)
    shares = torch.softmax(received.double() / temperature, dim=-1)
    return highest_until(shares, tau - ROUNDING)


def highest_until(shares: Tensor, tau: float) -> Tensor:
    """Return the highest entries of each row up to and including the one at which their sum reaches tau."""
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    short = (ordered.cumsum(dim=-1) < tau).sum(dim=-1, keepdim=True)  # entries whose sum is still below tau
    rank = torch.arange(shares.shape[-1], device=shares.device).expand_as(shares)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, rank <= short)


def contextual_count(tokens: int, fraction: float) -> int:
    """How many contextual targets a slice of `tokens` tokens has at most."""
    return max(int(fraction * tokens), 1) if fraction > 0 else 0


def contextual_targets(dominant: Tensor, count: int) -> Tensor:
    """Return `count` of the other tokens per slice at an even stride, or all of them where there are fewer.

    dominant: (S, n) bool. Returns (S, n) bool.
    """
    rest = ~dominant
    if count == 0:
        return torch.zeros_like(rest)
    rank = rest.cumsum(dim=-1) - 1
    step = (rest.sum(dim=-1, keepdim=True) // count).clamp(min=1)
    return rest & (rank % step == 0) & (rank // step < count)


def places_of(targets: Tensor, count: int) -> Tensor:
    """Return where the targets of each slice are, in order: (S, count) int64, n where there are fewer."""
    tokens = targets.shape[-1]
    place = torch.arange(tokens, device=targets.device).expand_as(targets)
    return torch.where(targets, place, tokens).sort(dim=-1).values[:, :count]


def nearest_target(keys: Tensor, dominant: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """Return for each token that is neither dominant nor a target the target with the most similar key.

    keys: (S, n, d); places: of the targets. Cosine; on ties the first target.
    Returns (S, n) int64, -1 for every other token.
    """
    tokens = keys.shape[1]
    if places.shape[1] == 0:
        return torch.full_like(targets, -1, dtype=torch.int64)
    units = torch.nn.functional.normalize(keys.float(), dim=-1)
    chosen = units.gather(1, places.clamp(max=tokens - 1).unsqueeze(-1).expand(-1, -1, units.shape[-1]))
    similarity = units @ chosen.transpose(1, 2)  # (S, n, count)
    similarity = similarity.masked_fill((places == tokens).unsqueeze(1), -torch.inf)
    nearest = places.gather(1, similarity.argmax(dim=-1))
    return torch.where(dominant | targets, -1, nearest)


def merge(features: Tensor, merged_into: Tensor, places: Tensor, *, count_target: bool) -> Tensor:
    """Give each target the mean of its tokens: with itself counted in, or added to itself (a sum).

    features: (S, n, c); merged_into: (S, n) int64, -1 where not merged. Keeps the dtype; a target without
    tokens and every other row stay bit for bit. A matrix product, so that a device repeats its result.
    """
    tokens = features.shape[1]
    padded = torch.nn.functional.pad(features, (0, 0, 0, 1))  # a last row for places that hold no target
    index = places.unsqueeze(-1).expand(-1, -1, features.shape[-1])
    own = padded.gather(1, index)  # (S, count, c)
    arriving = (merged_into.unsqueeze(1) == places.unsqueeze(2)).float()  # (S, count, n)
    number = arriving.sum(dim=-1, keepdim=True)
    total = arriving @ features.float()
    whole = own.float()
    merged = (whole + total) / (1 + number) if count_target else whole + total / number.clamp(min=1)
    return padded.scatter(1, index, torch.where(number > 0, merged.to(features.dtype), own))[:, :tokens]
