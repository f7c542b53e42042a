"""Look at queries and keys of one vision layer while the stock model runs.

A registered attention function computes what the plain one computes and, while somebody watches, shows the
watched layer's queries and keys. Who watches is a context variable: nothing is left behind after an exception,
and two threads do not see each other's slices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# (queries (S, H, N, D), keys (S, H, N, D), scale) of one call of the watched layer
Show = Callable[[Tensor, Tensor, float], None]


@dataclass(frozen=True, slots=True)
class _Watch:
    layer: nn.Module
    show: Show


_watch: ContextVar[_Watch | None] = ContextVar("watched vision layer", default=None)


def tapped(attention: str) -> str:
    """Return the name of the attention function that can be watched and else is `attention` itself.

    attention: `sdpa` or `eager`. Registering again changes nothing.
    """
    name = f"medpruner_{attention}"

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch = _watch.get()
        if watch is not None and module is watch.layer:
            watch.show(query, key, kwargs["scaling"])
        # eager attention lives in each model's own file
        eager = sys.modules[type(module).__module__].eager_attention_forward
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)
        return plain(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    return name


def vision_attention(attention: str) -> str:
    """Return what the tower runs when the text model runs `attention`.

    A flash attention package gets no tap; torch's sdpa takes flash kernels on CUDA by itself.
    """
    return "sdpa" if attention == "flash_attention_2" else attention


@contextmanager
def watching(layer: nn.Module, show: Show) -> Iterator[None]:
    """Call `show` with each set of queries and keys of `layer` (its attention module) inside the block."""
    token = _watch.set(_Watch(layer, show))
    try:
        yield
    finally:
        _watch.reset(token)
