"""A GPU keeps the tokens and writes the texts that the processor does; in bfloat16 it says how far off it is.

`./run prove devices [--device cuda:0] [--studies 24] [--first-seed 1000]`. The demonstration model reads the same
phantoms by the product's own host, pruned as by default: on the processor in float32, on the device in float32 and
twice in bfloat16. Exit status 1 when the device in float32 keeps other tokens, writes another text or decides a closed
question differently, or when bfloat16 does not repeat itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from service.shared.settings import ModelSettings, PruningSettings, ReportSettings
from workers.demo_model.evaluate import PROTOCOLS, Study, study_of
from workers.questions import questions_about
from workers.vlm import Generation, Reading, open_model
from workers.vlm.folder import device_of

PROTOCOL = PROTOCOLS["thick-256"]  # scanned, as a real study is
COLUMNS = ("", "other tokens", "same tokens", "same text", "decided alike", "scores differ by", "answers by")


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two readings of the same studies. Scores average 1 over an input; answers are probabilities."""

    studies: int
    same_tokens: int
    moved_tokens: int
    same_texts: int
    questions: int
    decided_alike: int
    scores: float
    answers: float

    @property
    def none(self) -> bool:
        """Nothing that anybody would see: the numbers behind may differ by rounding."""
        return self.same_tokens == self.same_texts == self.studies and self.decided_alike == self.questions


def difference(one: Sequence[Generation], other: Sequence[Generation]) -> Difference:
    pairs = list(zip(one, other, strict=True))
    answers = [(p, q) for a, b in pairs for p, q in zip(a.answers, b.answers, strict=True)]
    return Difference(
        studies=len(pairs),
        same_tokens=sum(np.array_equal(a.tokens, b.tokens) for a, b in pairs),
        moved_tokens=sum(int((a.tokens != b.tokens).sum()) for a, b in pairs),
        same_texts=sum(a.text == b.text for a, b in pairs),
        questions=len(answers),
        decided_alike=sum(int(np.argmax(p) == np.argmax(q)) for p, q in answers),
        scores=max((float(np.nanmax(np.abs(a.scores - b.scores), initial=0)) for a, b in pairs), default=0.0),
        answers=max((float(np.abs(np.subtract(p, q)).max()) for p, q in answers), default=0.0),
    )


def row(name: str, found: Difference) -> str:
    counts = (
        *(found.moved_tokens, f"{found.same_tokens} of {found.studies}", f"{found.same_texts} of {found.studies}"),
        *(f"{found.decided_alike} of {found.questions}", f"{found.scores:.1e}", f"{found.answers:.1e}"),
    )
    return f"| {name} | " + " | ".join(map(str, counts)) + " |"


def read(studies: Sequence[Study], device: str, dtype: str) -> list[Generation]:
    model = open_model(ModelSettings(device=device, dtype=dtype))
    asked = partial(questions_about, model.coded_findings)
    prompt, pruning = ReportSettings().prompt, PruningSettings()
    return [model.read(Reading(one.images, prompt, pruning, 128, guide=one.guide, questions=asked)) for one in studies]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="devices")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--studies", type=int, default=24)
    parser.add_argument("--first-seed", type=int, default=1000)
    options = parser.parse_args(arguments)
    device_of(ModelSettings(device=options.device))  # before a minute of phantoms
    _say(f"torch {torch.__version__}; making {options.studies} phantoms")
    studies = [study_of(options.first_seed + index, PROTOCOL) for index in range(options.studies)]
    usual = read(studies, "cpu", "float32")
    full = difference(usual, read(studies, options.device, "float32"))
    half, again = (read(studies, options.device, "bfloat16") for _ in range(2))
    repeated = difference(half, again)
    for line in (f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", row(f"{options.device}, float32", full)):
        _say(line)
    _say(row(f"{options.device}, bfloat16", difference(usual, half)))
    _say(row("bfloat16 against bfloat16 again", repeated))
    broken = [
        what
        for what, found in (
            (f"{options.device} in float32 reads otherwise than the processor", full),
            (f"{options.device} in bfloat16 does not repeat itself", repeated),
        )
        if not found.none
    ]
    for what in broken:
        _say(f"BROKEN: {what}")
    return 1 if broken else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
