"""Tiny tensors: one thread is faster than two, and leaves the other core to other tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
