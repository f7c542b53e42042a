"""What scoring the tokens adds to the full vision tower of MedGemma, in time and memory. (`./run bench pruning`)

Random weights at real widths: 27 layers, 1152 wide, 16 heads, 4096 patches a slice. CPU, float32.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from workers.pruning.attention import received_attention
from workers.pruning.groups import blocks, group_mean
from workers.pruning.tokens import reduce_tokens
from workers.vlm.memory import peak_bytes, start_peak
from workers.vlm.tap import tapped, watching

SIDE, POOLED = 64, 4  # 64 x 64 patches, 4 x 4 of them make a token
WIDTH, HIDDEN, HEADS, LAYERS = 1152, 4304, 16, 27
TEXT_WIDTH = 2560
GIB = 2**30


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run bench pruning", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=5, help="of the scoring alone; the median counts")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with torch.inference_mode():
        lines = measured(options.layers, options.rounds)
    print("\n".join(lines))  # noqa: T201
    return 0


def measured(layers: int, rounds: int) -> list[str]:
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            image_size=14 * SIDE,
            patch_size=14,
            vision_use_head=False,
        )
    ).eval()
    tower.set_attn_implementation(tapped("sdpa"))
    last: Any = tower.encoder.layers[-1].self_attn
    groups = blocks(SIDE, SIDE, POOLED)
    pixels = torch.randn(1, 3, 14 * SIDE, 14 * SIDE)
    caught: list[tuple[Tensor, Tensor, float]] = []

    def score(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        received = group_mean(received_attention(queries, keys, scale=scale), groups)
        return received, group_mean(keys.float().mean(dim=1), groups)

    with watching(last, lambda queries, keys, scale: caught.append((queries, keys, scale))):
        began = perf_counter()
        tower(pixels)
        tower_s = perf_counter() - began
    [(queries, keys, scale)] = caught

    before = start_peak_bytes()
    scoring_s = []
    for _ in range(rounds):
        began = perf_counter()
        received, mean_keys = score(queries, keys, scale)
        scoring_s.append(perf_counter() - began)
    scoring_gib = (peak_bytes(pixels.device) - before) / GIB
    features = torch.randn(1, len(groups), TEXT_WIDTH)
    began = perf_counter()
    reduced = reduce_tokens(received, mean_keys, features, tau=0.9, temperature=2.0, contextual_fraction=0.05)
    choosing_s = perf_counter() - began

    before = start_peak_bytes()
    began = perf_counter()
    torch.softmax(queries @ keys.mT * scale, dim=-1).mean(dim=1).sum(dim=1)
    explicit_s = perf_counter() - began
    explicit_gib = (peak_bytes(pixels.device) - before) / GIB
    share = (median(scoring_s) + choosing_s) / tower_s
    return [
        f"{layers} layers, {HEADS} heads x {SIDE**2} patches, one slice, float32, {torch.get_num_threads()} threads",
        f"tower                     {tower_s:8.2f} s",
        f"scoring (median of {rounds})     {median(scoring_s):8.2f} s   + {scoring_gib:.3f} GiB",
        f"choosing and merging      {choosing_s:8.4f} s   {int(reduced.kept.sum())} of {len(groups)} tokens kept",
        f"explicit softmax          {explicit_s:8.2f} s   + {explicit_gib:.3f} GiB (as the reference computes it)",
        f"the token stage adds      {share:8.2%} of the tower's time",
    ]


def start_peak_bytes() -> int:
    """Forget the peak so far; what is in use now."""
    device = torch.device("cpu")
    start_peak(device)
    return peak_bytes(device)
