"""The one condition all of pruning has: every value is a number."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Some values are NaN or infinite; every comparison with them is false, so any choice would be wrong."""


def require_finite(values: Tensor, name: str) -> None:
    """Raise NotFinite, naming the tensor. Waits for the device once."""
    if not bool(torch.isfinite(values).all()):
        raise NotFinite(f"{name}: NaN or infinite values among {values.numel()}")
