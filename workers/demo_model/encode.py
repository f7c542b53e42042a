"""Studies through the trained tower once, so that the language model can be taught on them many times."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.shared.settings import PruningMethod, PruningSettings
from workers.demo_model.labels import Labels
from workers.demo_model.phantom import Phantom, as_slabs
from workers.demo_model.pool import Example
from workers.demo_model.render import Mask
from workers.demo_model.targets import Sign, Targets
from workers.demo_model.train_vision import Eyes
from workers.guide import Guide, make_guide
from workers.pruning.attention import received_attention
from workers.pruning.groups import blocks, group_mean
from workers.pruning.slices import keep_all
from workers.regions import Spacing
from workers.vlm import encode as tower
from workers.vlm import stages

SUSPECTS = (Sign.NODULE, Sign.EFFUSION, Sign.CONSOLIDATION, Sign.PNEUMOTHORAX, Sign.CALCIFICATION, Sign.ENLARGED)


@dataclass(frozen=True, slots=True)
class Places:
    """Numbers, from 1, of the slabs that show a finding best; None without one."""

    nodule: int | None = None  # holds the centre of the largest
    consolidation: int | None = None  # holds most of it


def places_of(phantom: Phantom) -> Places:
    """Of a phantom as slabs."""
    if not phantom.labels.supported:
        return Places()
    largest = max(phantom.findings.nodules, key=lambda nodule: nodule.diameter_mm, default=None)
    opaque = ((phantom.masks & Mask.CONSOLIDATION) > 0).sum(axis=(1, 2))
    return Places(
        nodule=int(np.abs(phantom.z_mm - largest.centre_mm[2]).argmin()) + 1 if largest else None,
        consolidation=int(opaque.argmax()) + 1 if phantom.findings.consolidations and opaque.any() else None,
    )


def guide_of(phantom: Phantom) -> Guide:
    """What the worker would know of a phantom as slabs before the model sees it."""
    slabs, places = phantom.values.astype(np.float32), -phantom.z_mm.astype(np.float64)
    along = float(np.median(np.diff(places)))
    return make_guide(
        slabs,
        places,
        spacing=Spacing(along, phantom.pixel_mm, phantom.pixel_mm),
        modality=phantom.modality.value,
        window=(float(slabs.min()), float(slabs.max())),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the language model's training needs of one scan. images: (S, P, P, 3) uint8; targets: on the token grid."""

    images: NDArray[np.uint8]
    labels: Labels
    guide: Guide
    places: Places
    targets: Targets


def see(example: Example) -> Seen:
    slabs = as_slabs(example.phantom)
    return Seen(
        example.images,
        example.labels,
        guide_of(slabs),
        places_of(slabs),
        example.member.tokens,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One study as S slabs of n projected tokens.

    features: (S, n, c) float16; received: (S, n) float32 and keys: (S, n, d) float16 of the tower's last layer, as
    the pruner wants them; suspicion: (S, n, 6) float16, the tower's own logits for SUSPECTS. The rest as in Seen.
    """

    features: Tensor
    received: Tensor
    keys: Tensor
    suspicion: Tensor
    guide: Guide
    labels: Labels
    places: Places
    targets: Targets

    @property
    def side(self) -> int:
        """Tokens along an edge of a slab."""
        return isqrt(self.features.shape[1])


@torch.no_grad()
def encode(eyes: Eyes, seen: Seen) -> Encoded:
    attention: Any = eyes.tower.encoder.layers[-1].self_attn
    caught: list[Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda module, inputs, keywords: caught.append(inputs[0] if inputs else keywords["hidden_states"]),
        with_kwargs=True,
    )
    try:
        features = eyes.tokens(eyes.pixels(seen.images))
    finally:
        handle.remove()
    queries, keys = (_heads(layer(caught[0]), attention.num_heads) for layer in (attention.q_proj, attention.k_proj))
    side = eyes.projector.patches_per_image
    groups = blocks(side, side, eyes.projector.kernel_size)
    received = group_mean(received_attention(queries, keys, scale=attention.scale), groups)
    suspicion = eyes.token_head(features)[..., list(SUSPECTS)]
    return Encoded(
        features.half().cpu(),
        received.cpu(),
        group_mean(keys.mean(dim=1), groups).half().cpu(),
        suspicion.half().cpu(),
        seen.guide,
        seen.labels,
        seen.places,
        seen.targets,
    )


def _heads(values: Tensor, heads: int) -> Tensor:
    slabs, patches, width = values.shape
    return values.view(slabs, patches, heads, width // heads).transpose(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What the language model is shown of a study. features: (S, n, c) float32; kept: (S, n) bool."""

    features: Tensor
    kept: Tensor


def show_suspects(encoded: Encoded, random: np.random.Generator, each: int = 4, others: int = 8) -> Shown:
    """A short reading: the tokens that the tower itself finds most suspicious, and some at random.

    Chosen by the tower's opinion, never by the labels: a normal study shows as many tokens as any other.
    """
    slabs, tokens, _ = encoded.features.shape
    kept = torch.zeros(slabs * tokens, dtype=torch.bool)
    for opinion in encoded.suspicion.float().flatten(0, 1).T:
        kept[opinion.topk(each).indices] = True
    kept[torch.from_numpy(random.choice(slabs * tokens, others, replace=False))] = True
    return Shown(encoded.features.float(), kept.view(slabs, tokens))


@dataclass(frozen=True, slots=True)
class Setting:
    """How the tokens of a long reading are pruned."""

    pruning: PruningSettings
    share: float = 1.0  # of the tokens left to stand at random


LATE_FROM, LATE_BY = 0.1, 0.3  # share of the training between which readings become as long as in use
GUARDED = PruningSettings(method=PruningMethod.GUARDED, token_budget=0.5)  # as it is measured
FEW_EARLY, FEW_LATE = 0.8, 0.05  # share of readings with about a quarter of the tokens


def draw_setting(random: np.random.Generator, over: float = 1.0) -> Setting:
    """Everything, either of the product's pruners at some setting, or chance; never by what is in the study.

    over: share of the training that is over. Short readings cost a third and come first.
    """
    late = min(1.0, max(0.0, (over - LATE_FROM) / (LATE_BY - LATE_FROM)))
    few = FEW_EARLY + (FEW_LATE - FEW_EARLY) * late
    way, off = float(random.random()), PruningSettings(method=PruningMethod.OFF)
    if way < few * 0.75:
        return Setting(_guarded(random, (0.6, 1.0), (0.15, 0.35)))
    if way < few:
        return Setting(off, float(random.uniform(0.15, 0.4)))
    way = float(random.random())
    if way < 0.35:
        return Setting(off)
    if way < 0.6:
        return Setting(GUARDED)
    if way < 0.85:
        return Setting(_guarded(random, (0.8, 1.0), (0.35, 0.65)))
    if way < 0.95:
        return Setting(PruningSettings(method=PruningMethod.MEDPRUNER, tau=float(random.uniform(0.5, 1.0))))
    return Setting(off, float(random.uniform(0.4, 1.0)))


def _guarded(random: np.random.Generator, taus: tuple[float, float], budgets: tuple[float, float]) -> PruningSettings:
    return PruningSettings(
        method=PruningMethod.GUARDED,
        tau=float(random.uniform(*taus)),
        token_budget=float(random.uniform(*budgets)),
        coverage_lung=float(random.choice([1.0, random.uniform(0.3, 1.0)])),
        coverage_other=float(random.uniform(0.05, 0.3)),
    )


def show_pruned(encoded: Encoded, setting: Setting, random: np.random.Generator) -> Shown:
    """A long reading as in use, by the host's own token stage."""
    features = encoded.features.float()
    slabs, tokens, _ = features.shape
    scored = stages.is_scored(setting.pruning)
    known = tower.Encoded(features, (), encoded.received if scored else None, encoded.keys.float() if scored else None)
    grid = (encoded.side, encoded.side)
    guide = encoded.guide if setting.pruning.method is PruningMethod.GUARDED else None
    reduced = stages.choose_tokens(known, setting.pruning, stages.guards(guide, setting.pruning, keep_all(slabs), grid))
    kept = reduced.kept & torch.from_numpy(random.random((slabs, tokens)) < setting.share)
    return Shown(reduced.features, kept)
