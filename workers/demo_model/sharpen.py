"""Between the stages of training: a projection whose tokens differ more, from the same tower.

Seven tenths of a projected token's energy are the mean of all tokens, and Gemma 3 normalises what it reads to a fixed
length: little is left for what a token shows. So the mean is taken out; and into each of the directions in which tokens
differ least goes a linear reading of one sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from workers.demo_model.pool import Example
from workers.demo_model.targets import SIGNS, Sign
from workers.demo_model.train_vision import Eyes
from workers.pruning.groups import blocks

READINGS = SIGNS + 1  # and the logarithm of the nodule's diameter
OTHER_SPREAD = 1.5  # standard deviation of a reading; that of the other directions is about 1.3
SPREAD = {
    Sign.NODULE: 4.0,
    Sign.SOLID: 2.5,
    Sign.EFFUSION: 2.5,
    Sign.CONSOLIDATION: 2.5,
    Sign.PNEUMOTHORAX: 2.5,
    Sign.CALCIFICATION: 2.5,
}
STEPS, TOKENS_PER_STEP, RATE = 250, 16384, 0.05


@torch.no_grad()
def pooled(eyes: Eyes, example: Example) -> Tensor:
    """(S, n, width of the tower): what the projector multiplies."""
    projector = eyes.projector
    side = projector.patches_per_image
    patches = eyes.tower(eyes.pixels(example.images)).last_hidden_state
    result: Tensor = projector.mm_soft_emb_norm(patches[:, blocks(side, side, projector.kernel_size)].mean(dim=2))
    return result


def sharpen(eyes: Eyes, studies: Sequence[Example], seed: int) -> None:
    """Change the projector by what these studies show. The tower's own head on the tokens no longer fits them."""
    tokens = torch.cat([pooled(eyes, one).flatten(0, 1) for one in studies])
    mean = tokens.mean(dim=0)
    readings = fit_readings(tokens - mean, targets_in(studies, tokens.device), seed)
    with torch.no_grad():
        project_apart(eyes.projector, readings, mean, tokens)


def targets_in(studies: Sequence[Example], device: torch.device) -> list[Tensor]:
    """What the tokens of all these studies show, one after the other."""
    return [
        torch.cat([torch.from_numpy(getattr(one.member.tokens, name)).flatten(0, 1) for one in studies]).to(device)
        for name in ("present", "weight", "log_diameter")
    ]


def fit_readings(tokens: Tensor, targets: Sequence[Tensor], seed: int) -> Tensor:
    """(width, READINGS) by logistic regression on whitened tokens (N, width) without their mean."""
    values, axes = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
    whiten = axes @ torch.diag((values + 1e-2 * values.mean()).rsqrt()) @ axes.T
    white = tokens @ whiten
    device = tokens.device
    reading = torch.zeros(tokens.shape[1], READINGS, device=device, requires_grad=True)
    offset = torch.zeros(READINGS, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([reading, offset], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        some = torch.randint(len(white), (TOKENS_PER_STEP,), generator=generator).to(device)
        present, weight, log_diameter = (target[some] for target in targets)
        logits = white[some] @ reading + offset
        entropy = functional.binary_cross_entropy_with_logits(logits[:, :SIGNS], present, reduction="none")
        nodule = present[:, Sign.NODULE]
        size = ((logits[:, SIGNS] - (log_diameter - 2.3)) ** 2 * nodule).sum() / nodule.sum().clamp(min=1)
        loss = (entropy * weight).sum(dim=1).mean() + 0.1 * size + 1e-4 * (reading**2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimiser.step()
    result: Tensor = whiten @ reading.detach()
    return result


def project_apart(projector: Gemma3MultiModalProjector, readings: Tensor, mean: Tensor, tokens: Tensor) -> None:
    """Take the mean's direction out of the projection, and give the readings the directions that it uses least."""
    weight: Tensor = projector.mm_input_projection_weight
    weight -= torch.outer(mean, mean @ weight) / (mean @ mean)
    projected = tokens @ weight
    least = torch.linalg.eigh(projected.T @ projected).eigenvectors[:, :READINGS]
    weight -= weight @ least @ least.T
    away = readings - torch.outer(mean, mean @ readings) / (mean @ mean)
    spread = torch.full((READINGS,), OTHER_SPREAD, device=tokens.device)
    for sign, value in SPREAD.items():
        spread[sign] = value
    weight += away / (tokens @ away).std(dim=0).clamp(min=1e-6) * spread @ least.T
