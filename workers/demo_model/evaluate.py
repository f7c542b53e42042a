"""A model folder on held-out phantoms, through the product's own host: accuracy, tokens kept, time.

python -m workers.demo_model.evaluate --model FOLDER --seeds 0-499 --method off
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.shared.settings import ModelSettings, PruningSettings, ReportSettings
from workers.demo_model.accuracy import Pair, accuracy_of, table
from workers.demo_model.channels import ct_images, mr_images, to_slabs
from workers.demo_model.phantom import SLABS, THICK, Modality, Phantom, Protocol, generate_mixed
from workers.demo_model.report_text import read
from workers.vlm import VisionLanguageModel, open_model

PROTOCOLS = {
    "slabs": SLABS,  # rendered as the slabs that the model sees: quick
    "thick": THICK,  # 512 x 512, 5 mm, then averaged to slabs as a real study is
    "thick-256": Protocol(pixels=256, slice_mm=5.0),
}
HELD_OUT_SEEDS = range(0, 500_000_000)  # never trained on; see pool.TRAINING_SEEDS and train_vision.held_out_examples


@dataclass(frozen=True, slots=True)
class Reading:
    """One phantom, what was said of it, and what it cost."""

    seed: int
    pair: Pair
    text: str
    tokens_in: int
    tokens_kept: int
    cpu_s: float


def images_of(phantom: Phantom) -> NDArray[np.uint8]:
    """What the worker's preprocessing makes of this phantom for the demonstration model."""
    slabs = to_slabs(phantom.values)
    return ct_images(slabs) if phantom.modality is Modality.CT else mr_images(slabs)


def readings(
    model: VisionLanguageModel, seeds: range, protocol: Protocol, pruning: PruningSettings
) -> Iterator[Reading]:
    """Read phantom after phantom; a share of them is no chest CT."""
    prompt = ReportSettings().prompt
    for seed in seeds:
        phantom = generate_mixed(seed, protocol)
        images = images_of(phantom)
        begun = process_time()
        said = model.read(images, prompt, pruning, max_new_tokens=128)
        pair = phantom.labels, read(said.text)
        counts = said.counts
        yield Reading(seed, pair, said.text, counts.tokens_in, counts.tokens_kept, process_time() - begun)


def summary(found: list[Reading]) -> str:
    """Markdown: the accuracy, then tokens and time."""
    kept = sum(reading.tokens_kept for reading in found) / max(1, sum(reading.tokens_in for reading in found))
    seconds = sum(reading.cpu_s for reading in found) / max(1, len(found))
    accuracy = table(accuracy_of([reading.pair for reading in found]))
    return f"{accuracy}\nTokens kept: {kept:.1%}. CPU seconds per study: {seconds:.2f}.\n"


def main(arguments: list[str] | None = None, say: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(prog="evaluate")
    parser.add_argument("--model", type=Path, help="without it, the bundled demonstration model")
    parser.add_argument("--seeds", default="0-499", help="first-last")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="slabs")
    parser.add_argument("--method", default="off")
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--tau", type=float)
    parser.add_argument("--out", type=Path, help="a JSON line per study")
    options = parser.parse_args(arguments)
    given = {name: value for name in ("gamma", "tau") if (value := getattr(options, name)) is not None}
    pruning = PruningSettings(method=options.method, **given)
    first, last = (int(part) for part in options.seeds.split("-"))
    seeds = range(first, last + 1)
    if last not in HELD_OUT_SEEDS:
        parser.error(f"--seeds: {last} may have been trained on; choose seeds below {HELD_OUT_SEEDS.stop}")
    model = open_model(ModelSettings(threads=1, max_new_tokens=128), options.model)
    found = []
    for reading in readings(model, seeds, PROTOCOLS[options.protocol], pruning):
        found.append(reading)
        if options.out is not None:
            with options.out.open("a") as stream:
                stream.write(json.dumps(asdict(reading)) + "\n")
        if len(found) % 25 == 0:
            say(f"{len(found)} of {len(seeds)} studies\n")
    say(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
