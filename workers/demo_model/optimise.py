"""How weights are moved: Muon for the matrices of the layers, AdamW for the rest, one schedule for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def knows_half(device: str = "cpu") -> bool:
    """Whether this processor, or the device, computes in bfloat16; others take ten times as long as in float32."""
    return device != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Short warm-up, plateau, then linearly to zero at `steps`, or after `seconds` of this run if that is sooner.

    A run that is taken up again has its own seconds: on a machine shared with others the time is what is known.
    """

    steps: int
    decay_from: float
    seconds: float = float("inf")
    warm_up: int = 50

    def share(self, step: int, elapsed_s: float = 0.0) -> float:
        """How much of the training is over, 0 to 1."""
        return min(1.0, max(step / self.steps, elapsed_s / self.seconds))

    def factor(self, step: int, elapsed_s: float = 0.0) -> float:
        """Share of the rate at a step."""
        decay = (1 - self.share(step, elapsed_s)) / max(1 - self.decay_from, 1 / self.steps)
        return min(1.0, (step + 1) / self.warm_up, decay)


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


def agreed(seconds: float, processes: int) -> float:
    """The first process's clock, so that all of them end at the same step."""
    if processes == 1:
        return seconds
    told = torch.tensor([seconds], dtype=torch.float64)
    torch.distributed.broadcast(told, src=0)
    return float(told)


def average_gradients(module: nn.Module, processes: int) -> None:
    """Mean of the gradients of all processes, in one message."""
    if processes == 1:
        return
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu()
    torch.distributed.all_reduce(flat)
    flat /= processes
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
