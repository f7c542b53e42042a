"""Shape of the demonstration model: a stock Gemma3ForConditionalGeneration of about two million weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from workers.demo_model.channels import PIXELS

PATCH_PIXELS = 10
TOKENS_PER_IMAGE = 36
VISION_WIDTH = 192
VISION_HEAD_WIDTH = 24
TEXT_WIDTH = 128


def vision_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=VISION_WIDTH // VISION_HEAD_WIDTH,
        image_size=PIXELS,
        patch_size=PATCH_PIXELS,
        vision_use_head=False,
    )


def config(vocabulary: dict[str, int], image_tokens: dict[str, str]) -> Gemma3Config:
    """The whole model's configuration for a vocabulary whose first tokens are pad, eos, bos."""
    identity: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=8,  # queries and keys are normalised: 32 could not single out one of 864 tokens
            sliding_window=512,  # larger than one image's tokens
            layer_types=["sliding_attention", "full_attention"] * 2,
            max_position_embeddings=32768,
            **identity,
        ),
        vision_config=vision_config(),
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        boi_token_index=vocabulary[image_tokens["boi_token"]],
        eoi_token_index=vocabulary[image_tokens["eoi_token"]],
        image_token_index=vocabulary[image_tokens["image_token"]],
        **identity,
    )


def start_vision(tower: SiglipVisionModel, projector: Gemma3MultiModalProjector, generator: torch.Generator) -> None:
    """First weights of tower and projector.

    Half of the patch embedding starts as smooth bumps on a 5 x 5 grid, in the wide window and in the blob channel: a
    small round thing anywhere in the patch then moves some unit from the first step on. The projection starts away
    from zero, where transformers puts it, or the tower would get no gradient.
    """
    embeddings: Any = tower.embeddings
    embedding = embeddings.patch_embedding.weight  # (width, 3, 10, 10)
    width, _, side, _ = embedding.shape
    with torch.no_grad():
        embedding.normal_(0, 0.04, generator=generator)
        places = torch.linspace(1, side - 2, 5)
        pixel = torch.arange(side)
        for unit, (row, column) in enumerate((r, c) for r in places for c in places):
            bump = torch.exp(-((pixel[:, None] - row) ** 2 + (pixel[None, :] - column) ** 2) / (2 * 1.3**2))
            embedding[unit, 2] = bump * 0.5
            embedding[25 + unit, 0] = bump * 0.5
            embedding[25 + unit, 0] -= embedding[25 + unit, 0].mean()
        embeddings.position_embedding.weight.normal_(0, 0.3, generator=generator)
        projector.mm_input_projection_weight.normal_(0, width**-0.5, generator=generator)
