"""What scoring the tokens adds to the full vision tower of MedGemma, in time and memory. (`./run bench pruning`)

Random weights at real widths: 27 layers, 1152 wide, 16 heads, 4096 patches a slice. CPU, float32. Each part is measured
in a process of its own, for a process keeps memory that it no longer needs and so hides what a later step takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
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
CPU = torch.device("cpu")

Score = Callable[[Tensor, Tensor, float], object]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run bench pruning", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=5, help="of the scoring alone; the median counts")
    parser.add_argument("--one", choices=sorted(PARTS), help="measure this alone, in this process")
    options = parser.parse_args(arguments)
    if options.one:
        torch.manual_seed(0)
        with torch.inference_mode():
            print(json.dumps(PARTS[options.one](options.layers, options.rounds)))  # noqa: T201
        return 0
    found = {part: in_fresh_process(part, options.layers, options.rounds) for part in PARTS}
    print("\n".join(lines(found, options.layers, options.rounds)))  # noqa: T201
    return 0


def in_fresh_process(part: str, layers: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench", "pruning", "--one", part]
    command += ["--layers", str(layers), "--rounds", str(rounds)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(answer)
    print(f"{part}: {found}", file=sys.stderr, flush=True)  # noqa: T201
    return found


def lines(found: dict[str, dict[str, float]], layers: int, rounds: int) -> list[str]:
    tower, scored, scoring, explicit = (found[part] for part in ("tower", "scored", "scoring", "explicit"))
    above = scored["peak_gib"] - tower["peak_gib"]
    share = (scored["scoring_s"] + scoring["choosing_s"]) / (scored["tower_s"] - scored["scoring_s"])
    kept = f"{scoring['kept']:.0f} of {scoring['tokens']:.0f} tokens kept"
    return [
        f"{layers} layers, {HEADS} heads x {SIDE**2} patches, one slice, float32, {torch.get_num_threads()} threads",
        f"tower                    {tower['tower_s']:8.2f} s   peak {tower['peak_gib']:.3f} GiB, weights included",
        f"tower with scoring       {scored['tower_s']:8.2f} s   peak {scored['peak_gib']:.3f} GiB ({above:+.3f} GiB)",
        f"of it scoring            {scored['scoring_s']:8.2f} s",
        f"scoring alone            {scoring['scoring_s']:8.2f} s   + {scoring['peak_gib']:.3f} GiB (of {rounds})",
        f"choosing and merging     {scoring['choosing_s']:8.4f} s   {kept}",
        f"explicit softmax         {explicit['scoring_s']:8.2f} s   + {explicit['peak_gib']:.3f} GiB (the reference's)",
        f"the token stage adds     {share:8.2%} of the tower's time",
    ]


def score(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As the hosts do it."""
    groups = blocks(SIDE, SIDE, POOLED)
    received = group_mean(received_attention(queries, keys, scale=scale), groups)
    return received, group_mean(keys.float().mean(dim=1), groups)


def score_explicitly(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    return torch.softmax(queries @ keys.mT * scale, dim=-1).mean(dim=1).sum(dim=1)


def tower_alone(layers: int, rounds: int) -> dict[str, float]:
    return through_tower(layers, None)


def tower_scored(layers: int, rounds: int) -> dict[str, float]:
    return through_tower(layers, score)


def through_tower(layers: int, scoring: Score | None) -> dict[str, float]:
    """One slice; the peak is that of the whole process while it goes through."""
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
    pixels = torch.randn(1, 3, 14 * SIDE, 14 * SIDE)
    spent: list[float] = []

    def timed(queries: Tensor, keys: Tensor, scale: float) -> None:
        began = perf_counter()
        if scoring is not None:
            scoring(queries, keys, scale)
        spent.append(perf_counter() - began)

    start_peak(CPU)
    began = perf_counter()
    with watching(last, timed):
        tower(pixels)
    return {"tower_s": perf_counter() - began, "scoring_s": sum(spent), "peak_gib": peak_bytes(CPU) / GIB}


def scoring_alone(layers: int, rounds: int) -> dict[str, float]:
    """The scoring of one slice, several times, and what follows it."""
    found = without_tower(score, rounds)
    queries, keys = queries_and_keys()
    received, mean_keys = score(queries, keys, 72**-0.5)
    features = torch.randn(1, received.shape[1], TEXT_WIDTH)
    began = perf_counter()
    reduced = reduce_tokens(received, mean_keys, features, tau=0.9, temperature=2.0, contextual_fraction=0.05)
    choosing_s = perf_counter() - began
    return found | {"choosing_s": choosing_s, "kept": int(reduced.kept.sum()), "tokens": received.shape[1]}


def explicit_alone(layers: int, rounds: int) -> dict[str, float]:
    return without_tower(score_explicitly, min(rounds, 2))


def without_tower(scoring: Score, rounds: int) -> dict[str, float]:
    """Median seconds, and GiB above what the process had before the first."""
    queries, keys = queries_and_keys()
    start_peak(CPU)
    before, seconds = peak_bytes(CPU), []
    for _ in range(rounds):
        began = perf_counter()
        scoring(queries, keys, 72**-0.5)
        seconds.append(perf_counter() - began)
    return {"scoring_s": median(seconds), "peak_gib": (peak_bytes(CPU) - before) / GIB}


def queries_and_keys() -> tuple[Tensor, Tensor]:
    """Of one slice in the last layer."""
    shape = (1, HEADS, SIDE**2, WIDTH // HEADS)
    return torch.randn(shape), torch.randn(shape)


PARTS: dict[str, Callable[[int, int], dict[str, float]]] = {
    "tower": tower_alone,
    "scored": tower_scored,
    "scoring": scoring_alone,
    "explicit": explicit_alone,
}
