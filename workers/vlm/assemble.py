"""A prompt with placeholders for every token, and what survived of them -> what the language model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.pruning.slices import keep_all
from workers.pruning.tokens import Reduced
from workers.vlm.survivors import Survivors, survivors_of


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The whole prompt before tokens are taken out.

    input_ids: (L,) int64, one placeholder for each token of each encoded input, in order.
    positions: (3, L) int64 where the host's positions are not simply 0 .. L-1.
    """

    input_ids: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PrunedPrompt:
    """What the language model gets: shortened ids and positions, the features of the surviving placeholders."""

    input_ids: Tensor  # (L',)
    positions: Tensor | None  # (3, L')
    features: Tensor  # (kept, c)
    deepstack: tuple[Tensor, ...]  # each (kept, c)


def prune(prompt: Prompt, placeholder: int, reduced: Reduced, deepstack: Sequence[Tensor]) -> PrunedPrompt:
    """Take the tokens that were not kept out of the prompt."""
    everything = keep_all(len(reduced.kept))
    return without(prompt, placeholder, survivors_of(everything, reduced, tuple(deepstack), 0, 0))


def without(prompt: Prompt, placeholder: int, survivors: Survivors) -> PrunedPrompt:
    """Return the prompt with the placeholders of the survivors alone, and their features."""
    visual = prompt.input_ids == placeholder
    survives = torch.ones_like(visual)
    survives[visual] = survivors.kept.flatten().to(visual.device)
    return PrunedPrompt(
        input_ids=prompt.input_ids[survives],
        positions=None if prompt.positions is None else prompt.positions[:, survives],
        features=survivors.features,
        deepstack=survivors.deepstack,
    )


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack (..., L_i) tensors along a new first dimension, filled up on the left with `value`."""
    length = max(row.shape[-1] for row in rows)
    return torch.stack([nn.functional.pad(row, (length - row.shape[-1], 0), value=value) for row in rows])
