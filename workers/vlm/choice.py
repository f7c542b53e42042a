"""How probable a model holds each allowed answer to a closed question, after what it has read and said.

Keys and values of prompt and report are computed once and shared by all questions; no image is read again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from workers.pruning.finite import require_finite

BYTES_AT_ONCE = 2**29  # of copied keys and values: one copy per answer that is weighed at a time
ANSWERS_AT_ONCE = 32

# (ids (B, m), length of what the cache holds, cache, number of last positions) -> (logits (B, those, V), cache)
Forward = Callable[[Tensor, int, Any, int], tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What the model has read and said so far.

    cache: keys and values of the first `length` tokens, of one conversation; None: nothing yet.
    """

    cache: Any
    length: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One closed question as tokens.

    turn: what follows the report: its end of turn, the question, the beginning of the answer.
    answers: tokens of each allowed answer, without its end of turn; end: that end.
    """

    turn: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    end: int

    @property
    def longest(self) -> int:
        return len(self.turn) + max(map(len, self.answers)) + 1


def can_be_shared(cache: Any) -> bool:
    """Can several continuations start from this cache? One that is written in place cannot."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in cache.layers
    )


def probabilities(forward: Forward, said: Said, choice: Choice) -> tuple[float, ...]:
    """Return how probable each answer is among those allowed, their ends included; they add up to 1.

    Each answer's logarithm is the sum over its tokens and its end of turn. NotFinite when a logit is no number.
    """
    first, cache = forward(torch.tensor([choice.turn]), said.length, copied(said.cache, 1), 1)
    require_finite(first, "logits of the language model")
    after_turn = said.length + len(choice.turn)
    at_once = max(1, min(ANSWERS_AT_ONCE, BYTES_AT_ONCE // max(1, size_bytes(cache))))
    sums: list[Tensor] = []
    for start in range(0, len(choice.answers), at_once):
        some = choice.answers[start : start + at_once]
        width = max(map(len, some))
        rows = torch.tensor([[*answer, *[choice.end] * (width - len(answer))] for answer in some])
        rest, _ = forward(rows, after_turn, copied(cache, len(some)), width)
        require_finite(rest, "logits of the language model")
        logits = torch.cat([first.expand(len(some), -1, -1), rest], dim=1)
        targets = torch.cat([rows, torch.full((len(some), 1), choice.end)], dim=1).to(logits.device)
        steps = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
        lengths = torch.tensor([len(answer) for answer in some], device=steps.device)
        counted = torch.arange(width + 1, device=steps.device) <= lengths[:, None]  # up to its end, filling left out
        sums.append((steps * counted).sum(dim=1).double().cpu())
    return tuple(torch.cat(sums).softmax(dim=0).tolist())


def copied(cache: Any, rows: int) -> Any:
    """Return a cache that can be continued on its own, `rows` times; the given one stays as it is.

    A dynamic layer replaces its tensors and never writes into them, so one row copies nothing.
    """
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    if rows > 1:
        result.batch_repeat_interleave(rows)
    return result


def size_bytes(cache: Any) -> int:
    """Return the size of the keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def distinct(answers: Sequence[Sequence[int]]) -> bool:
    """Are all answers different as tokens, and none empty?"""
    return all(answers) and len({tuple(answer) for answer in answers}) == len(answers)
