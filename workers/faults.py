"""What an exception says about the worker itself: is there too little memory, can this process still use its GPU? Pure.

By name and text, so that the parent process may import it without torch.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """What to do about it differs."""

    OUT_OF_MEMORY = "out-of-memory"  # smaller pieces may do; the process is as good as before
    STICKY = "sticky"  # the CUDA context is lost: every later call in this process fails as well
    OTHER = "other"


_MEMORY_TYPES = ("MemoryError", "OutOfMemoryError")
_MEMORY_TEXTS = ("DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_STICKY_TYPES = ("AcceleratorError",)
_STICKY_TEXTS = ("CUDA error", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED", "device-side assert")


def fault_of(error: BaseException) -> Fault:
    """Judge one exception; those that it was raised from are not looked at."""
    types = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if types.intersection(_MEMORY_TYPES):
        return Fault.OUT_OF_MEMORY
    if not isinstance(error, RuntimeError):
        return Fault.OTHER
    if any(part in text for part in _MEMORY_TEXTS):
        return Fault.OUT_OF_MEMORY
    if types.intersection(_STICKY_TYPES) or any(part in text for part in _STICKY_TEXTS):
        return Fault.STICKY
    return Fault.OTHER
