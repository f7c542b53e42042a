"""How weights are moved: Muon for the matrices of the layers, AdamW for the rest, one schedule for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Schedule:
    """Short warm-up, plateau, then linearly to zero at `steps`."""

    rate: float
    steps: int
    decay_from: float
    warm_up: int = 50

    def factor(self, step: int) -> float:
        """Share of the rate at a step."""
        decay = (self.steps - step) / max(1.0, self.steps * (1 - self.decay_from))
        return min(1.0, (step + 1) / self.warm_up, max(decay, 0.0))


class Optimisers:
    """Muon and AdamW side by side. Embeddings, heads, norms and biases are AdamW's."""

    def __init__(self, module: nn.Module, rate: float) -> None:
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        matrices = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
        rest = [weight for name, weight in named if not (weight.ndim == 2 and ".layers." in name)]
        self._rate = rate
        self._both: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
        )
        self._weights = [*matrices, *rest]

    def step(self, factor: float) -> None:
        """Clip, move, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        for optimiser in self._both:
            for group in optimiser.param_groups:
                group["lr"] = self._rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser in self._both]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimiser, state in zip(self._both, states, strict=True):
            optimiser.load_state_dict(state)


def average_gradients(module: nn.Module, processes: int) -> None:
    """Mean of the gradients of all processes, in one message."""
    if processes == 1:
        return
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= processes
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
