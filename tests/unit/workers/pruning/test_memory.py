"""workers.pruning.attention: memory that does not grow with heads x patches x patches."""

from __future__ import annotations

import subprocess
import sys

GIB = 2**30
# one layer of MedGemma's tower; then 0.25 GiB on purpose, which the same meter must see
PROGRAM = """
import torch
from workers.pruning.attention import received_attention
from workers.vlm.memory import peak_bytes, start_peak

torch.set_num_threads(1)
device = torch.device("cpu")
queries, keys = torch.randn(2, 1, 16, 4096, 72).unbind()
start_peak(device)
before = peak_bytes(device)
received_attention(queries, keys, scale=72**-0.5)
scored = peak_bytes(device)
held = torch.ones(2**26)
print(scored - before, peak_bytes(device) - before)
"""


def test_scoring_a_layer_of_4096_patches_takes_little_memory() -> None:
    """At most 0.15 GiB at 16 heads, where the matrix itself would take 1 GiB; in a process that holds nothing else."""
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    scored, with_more = map(int, answer.split())

    assert scored <= 0.15 * GIB
    assert with_more >= 0.25 * GIB
