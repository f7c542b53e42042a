"""Greedy decoding: its settings, and the eye that is kept on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from workers.pruning.finite import NotFinite


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What was generated for some studies together.

    tokens: per study, up to its own end, end included.
    cache: keys and values of prompt and report, without the report's last token.
    """

    tokens: list[Tensor]
    cache: Any
    prefill_s: float
    decode_s: float


class Witness(LogitsProcessor):
    """Sees the logits of each step as they are: when the first came, and whether all were numbers.

    NaN logits would make greedy decoding say the token with id 0, silently.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._start = now()
        self._first: float | None = None
        self._nan: Tensor | None = None
        self._end = self._start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._first is None:
            self._first = self._now()
        nan = torch.isnan(scores).any()
        self._nan = nan if self._nan is None else self._nan | nan
        return scores

    def finish(self) -> None:
        """Stop the clock; NotFinite when any step had a NaN."""
        self._end = self._now()
        if self._nan is not None and bool(self._nan):
            raise NotFinite("logits of the language model are NaN; try [model] dtype float32 or bfloat16")

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


def up_to_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Cut what a batch padded behind the end of a shorter text."""
    is_end = torch.isin(tokens, torch.tensor(list(ends), dtype=tokens.dtype))
    places = is_end.nonzero()
    return tokens[: int(places[0]) + 1] if len(places) else tokens
