"""How much attention each patch receives in one vision layer, without ever holding the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # of float32 probabilities at a time; larger gains nothing on a CPU


def received_attention(
    queries: Tensor, keys: Tensor, *, scale: float, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Return the attention each patch receives: softmax over keys, mean over heads, sum over queries.

    queries, keys: (S, H, N, D) of one layer, after rotary embedding where there is one.
    scale: what the layer multiplies q.k with.
    Returns (S, N) float32; each row averages exactly 1. Memory above the inputs: about 3 * chunk_bytes.
    """
    slices, heads, patches, _ = queries.shape
    rows = max(1, chunk_bytes // (4 * heads * patches))  # query rows (of all heads of one slice) at a time
    received = torch.zeros(slices, patches, dtype=torch.float32, device=queries.device)
    together = max(1, rows // patches)  # small slices go several at a time
    for first in range(0, slices, together):
        some = slice(first, first + together)
        transposed = keys[some].transpose(-1, -2)
        for row in range(0, patches, rows):
            logits = (queries[some, :, row : row + rows] @ transposed) * scale
            received[some] += torch.softmax(logits, dim=-1, dtype=torch.float32).sum(dim=(1, 2))
    return received / heads
