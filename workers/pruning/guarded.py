"""Method `guarded`: what attention would drop is kept where anatomy, contrast or distance says so.

The order in which tokens are kept: the share promised to each region, then what stands out of its surroundings, then
what holds tau of the attention, then what resembles nothing that was kept; all within the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.pruning.finite import require_finite
from workers.pruning.slices import SliceChoice
from workers.pruning.tokens import ROUNDING, Reduced, highest_until

INPUTS_AT_ONCE = 16
LEVEL = 1e6  # between two levels of priority; within one the priority is 0 .. 1
SHARED = 1e5  # above every salience, below a level


@dataclass(frozen=True, slots=True, eq=False)
class Guards:
    """What is known of S inputs of n tokens, rows x columns.

    regions: (S, n, R) bool; body: (S, n) bool; salience: (S, n) float, 0 or more.
    coverage: (R,) share of each region's tokens that comes before everything else.
    tokens_in: of all inputs before the slice stage, which a budget as a share is of.
    """

    regions: Tensor
    body: Tensor
    salience: Tensor
    coverage: Tensor
    rows: int
    columns: int
    tokens_in: int


def keep_with_gap_cap(
    tiles: Tensor, positions_mm: Tensor, has_body: Tensor, *, tile_change: float, gap_cap_mm: float
) -> SliceChoice:
    """Drop an input only where no tile changed since the last kept one and the next may still come in time.

    tiles: (S, ...) on one wide smoothed window; positions_mm: (S,) increasing; has_body: (S,) bool.
    Neighbours among the kept inputs lie at most gap_cap_mm apart, or as far as the series spaces them. The first and
    the last input with body are kept; those without are dropped, unless none has any, and those before the first kept
    one are represented by it.
    distance: the greatest change of a tile. NotFinite when a tile is.
    """
    require_finite(tiles, "tiles")
    count = len(tiles)
    flat = tiles.reshape(count, -1).double().cpu()
    places, body = positions_mm.double().tolist(), has_body.tolist()
    if not any(body):
        body = [True] * count
    last_body = max(index for index in range(count) if body[index])
    kept, anchor, distance = [False] * count, [0] * count, [torch.nan] * count
    last: int | None = None
    for index in range(count):
        if last is None:
            kept[index] = body[index]
        elif body[index]:
            distance[index] = float((flat[index] - flat[last]).abs().max())
            too_far = index == last_body or places[index + 1] - places[last] > gap_cap_mm + ROUNDING
            kept[index] = distance[index] > tile_change or too_far
        if kept[index]:
            last = index
        anchor[index] = -1 if last is None else last
    first = kept.index(True)
    return SliceChoice(
        kept=torch.tensor(kept),
        anchor=torch.tensor([first if place < 0 else place for place in anchor]),
        distance=torch.tensor(distance, dtype=torch.float64),
    )


def reduce_tokens(
    received: Tensor,
    keys: Tensor,
    features: Tensor,
    guards: Guards,
    *,
    tau: float,
    sink_ratio: float,
    salience_floor: float,
    merge_similarity: float,
    token_budget: int,
) -> Reduced:
    """Keep tokens in the order of the guards, merge the rest into similar neighbours, drop what is left.

    received (S, n), keys (S, n, d), features (S, n, c) as in tokens.reduce_tokens.
    tau: share of the attention received (sinks and air left out) that each input's tokens hold.
    token_budget: tokens of all inputs together; each input keeps one at least, whatever the budget.
    What is kept for a region or for its salience takes nothing in, so that a small lesion stays what it was.
    """
    for values, name in ((received, "attention received"), (keys, "keys"), (features, "features")):
        require_finite(values, name)
    device = received.device
    body, salience = guards.body.to(device), guards.salience.to(device).double()
    body = body | ~body.any(dim=1, keepdim=True)  # an input without any would have no token
    sinks = find_sinks(received, body, sink_ratio)
    shares = attention_shares(received, body & ~sinks)
    salient = body & (salience >= salience_floor) & (salience > 0)
    nucleus = body & ~sinks & highest_until(shares, tau - ROUNDING) if tau < 1 else body & ~sinks
    promised = promised_order(guards.regions.to(device) & body[..., None], salience, guards.coverage.to(device))
    priority = torch.where(nucleus, LEVEL + shares, torch.full_like(shares, -torch.inf))
    priority = torch.where(salient, 2 * LEVEL + salience, priority)
    priority = torch.where(promised > 0, 3 * LEVEL + promised, priority)
    best = torch.where(body, priority.clamp(min=0) + shares, -1.0).argmax(dim=1, keepdim=True)
    priority = priority.scatter(1, best, 4 * LEVEL)
    kept = highest(priority, token_budget)
    merged_into = similar_neighbour(
        keys, body & ~kept, kept & (priority < 2 * LEVEL), guards.rows, guards.columns, merge_similarity
    )
    alone = body & ~kept & (merged_into < 0)
    room = token_budget - int(kept.sum())
    if room > 0:
        kept = kept | highest(torch.where(alone, shares + 1, -torch.inf), room)
    return Reduced(
        features=merge_mean(features, merged_into),
        kept=kept,
        merged_into=merged_into,
        scores=received.float(),
    )


def find_sinks(received: Tensor, body: Tensor, ratio: float) -> Tensor:
    """Tokens that receive more than `ratio` times their input's median within the body; (S, n) bool."""
    inside = received.double().masked_fill(~body, torch.nan)
    return inside > ratio * inside.nanmedian(dim=1, keepdim=True).values


def attention_shares(received: Tensor, counted: Tensor) -> Tensor:
    """Each token's share of its input's attention among the counted ones; (S, n) float64, 0 elsewhere."""
    mass = torch.where(counted, received.double(), 0.0)
    return mass / mass.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def promised_order(regions: Tensor, salience: Tensor, coverage: Tensor) -> Tensor:
    """(S, n) float64: above 0 for tokens within the share promised to a region, more for those that come first.

    Each region gives its most salient token of every input first, then the most salient ones of the whole stack. A
    token that holds parts of two regions counts for both, so a region of which only a share is promised takes first
    what others were promised already. Where a budget cuts, all regions lose the same part of what they were promised.
    """
    inputs, tokens, _ = regions.shape
    order = torch.zeros(inputs, tokens, dtype=torch.float64, device=regions.device)
    for region in coverage.argsort(descending=True, stable=True).tolist():
        inside = regions[..., region]
        size, share = int(inside.sum()), float(coverage[region])
        if size == 0 or share == 0:
            continue
        worth = torch.where(inside, salience, -torch.inf)
        if share < 1:
            worth = worth + torch.where(order > 0, SHARED, 0.0)
        first = torch.zeros_like(inside).scatter(1, worth.argmax(dim=1, keepdim=True), True) & inside
        wanted = max(int(first.sum()), int(-(-share * size // 1)))
        worth = (worth + torch.where(first, LEVEL, 0.0)).flatten()
        rank = torch.empty_like(worth).scatter(
            0, worth.argsort(descending=True, stable=True), torch.arange(len(worth), device=worth.device).double()
        )
        own = torch.where(inside.flatten() & (rank < wanted), 1 - rank / (wanted + 1), 0.0)
        order = torch.maximum(order, own.view(inputs, tokens))
    return order


def highest(priority: Tensor, count: int) -> Tensor:
    """The `count` highest entries above -inf, and every entry of the highest level (one per input); ties: first."""
    flat = priority.flatten()
    order = flat.argsort(descending=True, stable=True)[: max(count, 0)]
    chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, order, True)
    return ((chosen & (flat > -torch.inf)) | (flat >= 4 * LEVEL)).view_as(priority)


def similar_neighbour(
    keys: Tensor, sources: Tensor, targets: Tensor, rows: int, columns: int, similarity: float
) -> Tensor:
    """For each source the most similar target among its eight neighbours; (S, n) int64, -1 where none is enough."""
    count = keys.shape[0]
    units = torch.nn.functional.normalize(keys.float(), dim=-1).view(count, rows, columns, -1)
    open_to = targets.view(count, rows, columns)
    index = torch.arange(rows * columns, device=keys.device).view(rows, columns)
    best = torch.full((count, rows, columns), similarity, dtype=torch.float32, device=keys.device)
    found = torch.full((count, rows, columns), -1, dtype=torch.int64, device=keys.device)
    for down, right in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        here = slice(max(0, -down), rows - max(0, down)), slice(max(0, -right), columns - max(0, right))
        there = slice(max(0, down), rows + min(0, down)), slice(max(0, right), columns + min(0, right))
        cosine = (units[:, here[0], here[1]] * units[:, there[0], there[1]]).sum(dim=-1)
        seen = best[:, here[0], here[1]]
        none = found[:, here[0], here[1]] < 0
        better = open_to[:, there[0], there[1]] & ((cosine > seen) | (none & (cosine >= seen)))
        best[:, here[0], here[1]] = torch.where(better, cosine, seen)
        found[:, here[0], here[1]] = torch.where(better, index[there].expand(count, -1, -1), found[:, here[0], here[1]])
    return torch.where(sources, found.view(count, -1), -1)


def merge_mean(features: Tensor, merged_into: Tensor) -> Tensor:
    """Give each target the mean of itself and what was merged into it; every other row stays bit for bit.

    A matrix product, so that a device repeats its result; a few inputs at a time, for it has n x n entries.
    """
    places = torch.arange(features.shape[1], device=features.device).view(1, -1, 1)
    merged = []
    for own, into in zip(torch.split(features, INPUTS_AT_ONCE), torch.split(merged_into, INPUTS_AT_ONCE), strict=True):
        arriving = into.unsqueeze(1) == places
        number = arriving.sum(dim=-1, keepdim=True)
        total = arriving.float() @ own.float() + own.float()
        merged.append(torch.where(number > 0, (total / (1 + number)).to(own.dtype), own))
    return torch.cat(merged)
