"""Between two trainings: a tower and projector of twice the width that say the same, and can learn more.

After T. Chen et al., Net2Net (ICLR 2016): every unit twice, and what reads it reads half of each. Reading one copy by
some chance more and the other by as much less changes nothing yet, but lets the copies part.
"""

from __future__ import annotations

import torch
from torch import Tensor

States = dict[str, Tensor]


def widened(states: States, seed: int) -> States:
    """Weights of tower and projector by their names in Gemma3Model, to those of twice the width and as many heads."""
    random = torch.Generator().manual_seed(seed)
    return {name: _twice(name, weight, random) for name, weight in states.items()}


def _twice(name: str, weight: Tensor, random: torch.Generator) -> Tensor:
    if name.endswith("mm_input_projection_weight"):  # (in, out); the language model is as wide as before
        return _halves_read(weight.T, random).T.contiguous()
    if ".layers." in name and weight.ndim == 2:  # (out, in)
        return _halves_read(weight.repeat(2, 1), random)
    return torch.cat([weight, weight], dim=1 if name.endswith("position_embedding.weight") else 0)


def _halves_read(weight: Tensor, random: torch.Generator) -> Tensor:
    half = weight / 2
    apart = torch.randn(half.shape, generator=random) * half.std()
    return torch.cat([half + apart, half - apart], dim=1)
