"""Between the stages of training: a new tower's tokens as the language model that read an older tower's knows them.

So that it goes on from what it can, instead of learning to read anew. The towers stand still.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.demo_model.pool import Example
from workers.demo_model.sharpen import fit_readings, pooled, targets_in
from workers.demo_model.train_vision import Eyes

RIDGE = 1e-4  # of the mean eigenvalue, added to all of them


@torch.no_grad()
def carry_over(eyes: Eyes, old: Eyes, studies: Sequence[Example], seed: int) -> None:
    """Change the projector of `eyes` by what both towers make of these studies.

    The new projection is the least squares fit to the old tokens; but where the new tower reads a sign differently,
    tokens move as the old ones did with that sign. The new tower's own head on the tokens no longer fits them.
    """
    before, after = (torch.cat([pooled(one, study).flatten(0, 1) for study in studies]) for one in (old, eyes))
    targets = targets_in(studies, before.device)
    with torch.enable_grad():
        then, now = (_readings(tokens, targets, seed) for tokens in (before, after))
    tokens = before @ old.projector.mm_input_projection_weight
    pattern = _least_squares(then, tokens - tokens.mean(dim=0))  # how tokens change with each sign
    eyes.projector.mm_input_projection_weight.copy_(_least_squares(after, tokens + (now - then) @ pattern))


def _readings(tokens: Tensor, targets: Sequence[Tensor], seed: int) -> Tensor:
    """(N, READINGS) of mean 0 and variance 1."""
    centred = tokens - tokens.mean(dim=0)
    read = centred @ fit_readings(centred, targets, seed)
    return read / read.std(dim=0).clamp(min=1e-6)


def _least_squares(given: Tensor, wanted: Tensor) -> Tensor:
    square = given.T @ given
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    solution: Tensor = torch.linalg.solve(square + ridge, given.T @ wanted)
    return solution
