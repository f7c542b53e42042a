"""Why a study is not read. A refusal is an outcome; any other exception is a fault and may be retried."""

from __future__ import annotations

from enum import StrEnum


class RefusalCode(StrEnum):
    """Reasons that no second attempt would change; each stands in the audit beside its sentence."""

    NO_SUITABLE_SERIES = "no-suitable-series"  # no series of the study is one that we read
    NOT_A_STACK = "not-a-stack"  # the series has no usable slice positions, or mixed orientations or sizes
    MISSING_SLICES = "missing-slices"  # a gap wider than series.max_gap_mm
    TOO_FEW_SLICES = "too-few-slices"  # fewer readable slices than series.min_slices
    TOO_LARGE = "too-large"  # more voxels than a worker may hold; checked before anything is decoded
    NO_HOUNSFIELD_UNITS = "no-hounsfield-units"  # CT without a rescale to HU
    NO_CONTENT = "no-content"  # every voxel has the same value
    INPUT_REMOVED = "input-removed"  # retention removed images of the study before a late one reopened it
    CONTEXT_TOO_LONG = "context-too-long"  # more tokens than the model takes


class Refusal(Exception):
    """The reason, in one or more sentences fit for the audit: no patient data, no values of free text."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(code, reason)  # both, so that it survives pickling between processes
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
