"""Studies through the trained tower once, so that the language model can be taught on them many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.demo_model.labels import Labels
from workers.demo_model.targets import Sign
from workers.demo_model.train_vision import Eyes, to_pixels
from workers.pruning.attention import received_attention
from workers.pruning.groups import blocks, group_mean
from workers.pruning.tokens import reduce_tokens

BODY_GREY = 65  # of the red channel: about -500 HU
SUSPECTS = (Sign.NODULE, Sign.EFFUSION, Sign.CONSOLIDATION, Sign.PNEUMOTHORAX, Sign.CALCIFICATION, Sign.ENLARGED)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One study as S slabs of n projected tokens.

    features: (S, n, c) float16; received: (S, n) float32 and keys: (S, n, d) float16 of the tower's last layer, as the
    pruner wants them; suspicion: (S, n, 6) float16, the tower's own logits for SUSPECTS; body: (S, n) bool.
    """

    features: Tensor
    received: Tensor
    keys: Tensor
    suspicion: Tensor
    body: Tensor
    labels: Labels


@torch.no_grad()
def encode(eyes: Eyes, images: NDArray[np.uint8], labels: Labels) -> Encoded:
    """images: (S, P, P, 3) uint8."""
    attention: Any = eyes.tower.encoder.layers[-1].self_attn
    caught: list[Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda module, inputs, keywords: caught.append(inputs[0] if inputs else keywords["hidden_states"]),
        with_kwargs=True,
    )
    try:
        features = eyes.tokens(to_pixels(images))
    finally:
        handle.remove()
    queries, keys = (_heads(layer(caught[0]), attention.num_heads) for layer in (attention.q_proj, attention.k_proj))
    side = eyes.projector.patches_per_image
    groups = blocks(side, side, eyes.projector.kernel_size)
    received = group_mean(received_attention(queries, keys, scale=attention.scale), groups)
    suspicion = eyes.token_head(features)[..., list(SUSPECTS)]
    cells = side // eyes.projector.kernel_size
    return Encoded(
        features.half(),
        received,
        group_mean(keys.mean(dim=1), groups).half(),
        suspicion.half(),
        torch.from_numpy(_body(images, cells)),
        labels,
    )


def _heads(values: Tensor, heads: int) -> Tensor:
    slabs, patches, width = values.shape
    return values.view(slabs, patches, heads, width // heads).transpose(1, 2)


def _body(images: NDArray[np.uint8], cells: int) -> NDArray[np.bool_]:
    slabs, rows, columns, _ = images.shape
    inside = (images[..., 0] > BODY_GREY).reshape(slabs, cells, rows // cells, cells, columns // cells)
    return np.asarray(inside.mean(axis=(2, 4)).reshape(slabs, cells * cells) > 0.02, np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What the language model is shown of a study. features: (S, n, c) float32; kept: (S, n) bool."""

    features: Tensor
    kept: Tensor


def show_suspects(encoded: Encoded, random: np.random.Generator, each: int = 6, others: int = 16) -> Shown:
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

    tau: float | None  # the product's token stage; None: off
    share: float  # of the tokens left to stand at random
    body: bool  # tokens of air are dropped
    slabs: float  # share of the slabs left to stand at random


def draw_setting(random: np.random.Generator) -> Setting:
    """Everything, the product's pruner, or chance; never by what is in the study."""
    way = random.random()
    return Setting(
        tau=float(random.uniform(0.5, 1.0)) if way < 0.4 else None,
        share=float(random.uniform(0.3, 1.0)) if 0.4 <= way < 0.6 else 1.0,
        body=bool(random.random() < 0.5),
        slabs=float(random.uniform(0.5, 1.0)) if random.random() < 0.1 else 1.0,
    )


def show_pruned(encoded: Encoded, setting: Setting, random: np.random.Generator) -> Shown:
    """A long reading as in use."""
    features = encoded.features.float()
    slabs, tokens, _ = features.shape
    kept = torch.ones(slabs, tokens, dtype=torch.bool)
    if setting.tau is not None:
        reduced = reduce_tokens(
            encoded.received,
            encoded.keys.float(),
            features,
            tau=setting.tau,
            temperature=2.0,
            contextual_fraction=0.05,
        )
        features, kept = reduced.features, reduced.kept
    kept = kept & torch.from_numpy(random.random((slabs, tokens)) < setting.share)
    kept = kept & torch.from_numpy(random.random((slabs, 1)) < setting.slabs)
    if setting.body:
        kept = kept & encoded.body
    return Shown(features, kept)
