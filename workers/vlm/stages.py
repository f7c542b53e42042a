"""Slice stage and token stage as the settings ask for them. Decisions alone; the mathematics is workers.pruning's."""

from __future__ import annotations

import torch
from torch import Tensor

from service.shared.settings import PruningMethod, PruningSettings
from workers.guide import Guide
from workers.pruning import guarded
from workers.pruning.finite import require_finite
from workers.pruning.guarded import Guards, keep_with_gap_cap
from workers.pruning.slices import SliceChoice, keep_all, keep_changed
from workers.pruning.tokens import Reduced, contextual_count, keep_every_token, reduce_tokens
from workers.vlm.encode import Encoded


def is_scored(pruning: PruningSettings) -> bool:
    """Does the token stage run, so that attention must be watched?"""
    return pruning.method is not PruningMethod.OFF and pruning.token_stage


def choose_slices(pixels: Tensor, pruning: PruningSettings, guide: Guide | None = None) -> SliceChoice:
    """The slice stage as the settings ask for it; `guarded` without a guide drops nothing."""
    is_guarded = pruning.method is PruningMethod.GUARDED
    if pruning.method is PruningMethod.OFF or not pruning.slice_stage or (is_guarded and guide is None):
        require_finite(pixels, "slices")
        return keep_all(len(pixels))
    if is_guarded and guide is not None:
        require_finite(pixels, "slices")
        return keep_with_gap_cap(
            torch.from_numpy(guide.tiles),
            torch.from_numpy(guide.positions_mm),
            torch.from_numpy(guide.has_body),
            tile_change=pruning.tile_change,
            gap_cap_mm=pruning.gap_cap_mm,
        )
    return keep_changed(pixels, gamma=pruning.gamma)


def guards(guide: Guide | None, pruning: PruningSettings, choice: SliceChoice, grid: tuple[int, int]) -> Guards | None:
    """What `guarded` knows of the tokens of the kept inputs; None for the other methods."""
    if pruning.method is not PruningMethod.GUARDED:
        return None
    rows, columns = grid
    kept = choice.kept
    if guide is None:
        inputs, tokens = int(kept.sum()), rows * columns
        everywhere = torch.ones(inputs, tokens, dtype=torch.bool)
        regions, salience = torch.zeros(inputs, tokens, 0, dtype=torch.bool), torch.zeros(inputs, tokens)
        return Guards(regions, everywhere, salience, torch.zeros(0), rows, columns, tokens_in=len(kept) * tokens)
    tokens_of = guide.on_grid(rows, columns)
    promised = [pruning.coverage_lung if " lung" in name else pruning.coverage_other for name in guide.names]
    return Guards(
        regions=torch.from_numpy(tokens_of.regions)[kept],
        body=torch.from_numpy(tokens_of.body)[kept],
        salience=torch.from_numpy(tokens_of.salience)[kept],
        coverage=torch.tensor(promised, dtype=torch.float64),
        rows=rows,
        columns=columns,
        tokens_in=len(kept) * rows * columns,
    )


def budget_tokens(pruning: PruningSettings, tokens_in: int) -> int:
    """The token budget as a number, of `tokens_in` tokens before any pruning."""
    budget = pruning.token_budget
    return int(budget * tokens_in + 1e-9) if budget <= 1 else int(budget)


def choose_tokens(encoded: Encoded, pruning: PruningSettings, guarding: Guards | None = None) -> Reduced:
    """The token stage as the settings ask for it."""
    if encoded.received is None or encoded.keys is None:
        return keep_every_token(encoded.features)
    if guarding is not None:
        return guarded.reduce_tokens(
            encoded.received,
            encoded.keys,
            encoded.features,
            guarding,
            tau=pruning.tau,
            sink_ratio=pruning.sink_ratio,
            salience_floor=pruning.salience_floor,
            merge_similarity=pruning.merge_similarity,
            token_budget=budget_tokens(pruning, guarding.tokens_in),
        )
    return reduce_tokens(
        encoded.received,
        encoded.keys,
        encoded.features,
        tau=pruning.tau,
        temperature=pruning.temperature,
        contextual_fraction=pruning.contextual_fraction,
    )


def fewest_tokens(tokens: int, pruning: PruningSettings) -> int:
    """How many of an input's `tokens` the token stage keeps at least, whatever it sees."""
    if not is_scored(pruning):
        return tokens
    targets = contextual_count(tokens, pruning.contextual_fraction)
    return 1 if pruning.method is PruningMethod.GUARDED else min(tokens, 1 + targets)
