"""The memory peak of one request: of the device on CUDA, of the process on a CPU."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import torch


def start_peak(device: torch.device) -> None:
    """Forget the peak so far (where the system allows it; else the process' peak counts)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """Return the highest use since start_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def release(device: torch.device) -> None:
    """Give back what is held and not used: blocks of another size would not fit into it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
