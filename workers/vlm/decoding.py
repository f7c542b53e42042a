"""Greedy decoding: its settings, the eye that is kept on it, and when a text is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from workers.pruning.finite import NotFinite

LOOKED_FOR_EVERY = 16  # tokens: a look at them waits for the device
ROUNDS, LEAST, LONGEST = 4, 48, 64  # so often, over so many tokens, with so many to a round at most: a loop


class Ending(Enum):
    """Why a text is over."""

    OWN = auto()  # the model said its end
    LENGTH = auto()  # cut at max_new_tokens
    REPETITION = auto()  # the same words over and over; all rounds but the first are cut off


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What was generated for some studies together.

    tokens: per study, up to its own end, end included; endings: why it is over; generated: how many were made.
    cache: keys and values of prompt and report, without the report's last token.
    """

    tokens: list[Tensor]
    endings: list[Ending]
    generated: list[int]
    cache: Any
    prefill_s: float
    decode_s: float


class Witness(LogitsProcessor):
    """Sees the logits of each step as they are: when the first came, and whether a word could be chosen by them.

    NaN logits would make greedy decoding say the token with id 0, infinite ones whichever comes first; silently.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._start = now()
        self._first: float | None = None
        self._wrong: Tensor | None = None
        self._end = self._start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._first is None:
            self._first = self._now()
        wrong = ~torch.isfinite(scores.amax(dim=-1)).all()  # the greatest of any NaN is NaN
        self._wrong = wrong if self._wrong is None else self._wrong | wrong
        return scores

    def finish(self) -> None:
        """Stop the clock; NotFinite when there was no greatest logit at any step."""
        self._end = self._now()
        if self._wrong is not None and bool(self._wrong):
            raise NotFinite("logits of the language model are NaN or infinite; try [model] dtype float32 or bfloat16")

    @property
    def prefill_s(self) -> float:
        return (self._first or self._end) - self._start

    @property
    def decode_s(self) -> float:
        return self._end - (self._first or self._end)


def greedy(max_new_tokens: int, ends: Sequence[int], pad: int, *, static: bool = False) -> GenerationConfig:
    """Greedy decoding; sampling settings of the model's folder do not apply, for a result must be repeatable.

    static: keys and values in tensors of a fixed size, which lets transformers compile the step on CUDA.
    """
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        return_dict_in_generate=True,
        cache_implementation="static" if static else None,
    )


class Over(StoppingCriteria):
    """Ends each text of a batch at its own limit, or where it runs in circles; its own end is generate()'s to see."""

    def __init__(self, prompt: int, limits: Sequence[int], ends: Sequence[int]) -> None:
        self._prompt = prompt
        self._limits = tuple(limits)
        self._ends = frozenset(ends)
        self.lengths = list(limits)  # where each text is over at the latest; what a batch puts behind is padding

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self._prompt
        if length % LOOKED_FOR_EVERY == 0:
            for row, words in enumerate(input_ids[:, self._prompt :].tolist()):
                own = words[: self.lengths[row]]
                if self._ends.isdisjoint(own) and loop_in(own) is not None:
                    self.lengths[row] = len(own)
        return torch.tensor([length >= limit for limit in self.lengths], device=input_ids.device)


def end_of(tokens: Sequence[int], limit: int, ends: Sequence[int]) -> tuple[int, int, Ending]:
    """How many of a text's tokens count, how many were generated, why it is over; padding follows `limit` or an end."""
    own = next((place + 1 for place, token in enumerate(tokens[:limit]) if token in ends), None)
    if own is not None:
        return own, own, Ending.OWN
    generated = min(len(tokens), limit)
    loop = loop_in(tokens[:generated])
    if loop is None:
        return generated, generated, Ending.LENGTH
    start, period = loop
    return start + period, generated, Ending.REPETITION


def loop_in(tokens: Sequence[int]) -> tuple[int, int] | None:
    """Where the loop begins that a text ends in, and how many tokens a round has; None where it ends in none."""
    for period in range(1, LONGEST + 1):
        same = 0  # tokens at the end that are those of one round before
        while same + period < len(tokens) and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        if same + period >= max(ROUNDS * period, LEAST):
            return len(tokens) - same - period, period
    return None
