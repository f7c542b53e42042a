"""workers.faults: which exceptions mean too little memory, which a GPU that is lost to this process."""

from __future__ import annotations

import pytest
import torch

from workers.faults import Fault, fault_of
from workers.pruning.finite import NotFinite


def _raised_by_allocation() -> BaseException:
    """What torch raises on a CPU for more than any machine has."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was allocated")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (MemoryError(), Fault.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), Fault.OUT_OF_MEMORY),
        (_raised_by_allocation(), Fault.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Fault.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), Fault.STICKY),
        (RuntimeError("CUDA error: device-side assert triggered"), Fault.STICKY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Fault.STICKY),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (12)"), Fault.OTHER),
        (NotFinite("visual features"), Fault.OTHER),
        (ValueError("CUDA error"), Fault.OTHER),
        (OSError("no space"), Fault.OTHER),
    ],
    ids=str,
)
def test_exceptions_are_told_apart(error: BaseException, fault: Fault) -> None:
    """By what torch itself raises where that can be had here, else by its documented types and texts."""
    assert fault_of(error) is fault
