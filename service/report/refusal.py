"""A study that was refused -> an AnalysisOutput that says so, from which the report of the refusal is built. Pure."""

from __future__ import annotations

import numpy as np

from service.report.source import SourceStudy
from service.shared import messages
from service.shared.messages import AnalysisOutput, Flag, RetentionArrays, SourceState

# No report tells of these: whose it is is not known, or the images are gone
NEVER_REPORTED = ("patient-mismatch", "input-removed")
_NOT_READ = "No statement about the images is made."


def refused_output(
    source: SourceStudy, *, analysis_id: int, modality: str, reason: str, software_version: str
) -> AnalysisOutput:
    """What the worker would hand over had it nothing to say: no text of a model, no counts, every image not analysed.

    reason: the sentence on record, without patient data. source: of all images of the study.
    """
    in_order = sorted(source.instances, key=lambda one: (one.series_uid, one.sop_instance_uid))
    return AnalysisOutput(
        analysis_id=analysis_id,
        study_uid=source.study_uid,
        series_uid=in_order[0].series_uid,
        modality=modality,
        frame_of_reference_uid=None,
        series_reason="none",
        candidates=(),
        findings=_NOT_READ,
        impression=f"This study could not be analysed: {reason}",
        raw_text="",
        flags=(Flag.NOT_ANALYSED,),
        notes=(),
        model=messages.ModelIdentity(
            name="none",
            architecture="none",
            path="",
            weights_sha256="",
            transformers_version="",
            torch_version="",
            dtype="",
            device="",
            attention="",
        ),
        prompt="",
        max_new_tokens=0,
        pruning={},
        preprocessing={},
        counts=messages.Counts(
            slices_in_series=0,
            slices_readable=0,
            slices_sampled=0,
            inputs=0,
            inputs_kept=0,
            tokens_in=0,
            tokens_kept=0,
            tokens_merged=0,
            tokens_text=0,
            tokens_generated=0,
        ),
        timings_s={},
        memory_peak_bytes=0,
        software_version=software_version,
        retention=messages.Retention(
            sources=tuple(
                messages.SourceInstance(
                    sop_instance_uid=one.sop_instance_uid,
                    position_mm=None,
                    state=SourceState.UNREADABLE,
                    reason="not analysed",
                )
                for one in in_order
            ),
            inputs=(),
            token_rows=1,
            token_columns=1,
        ),
        arrays_sha256="",
    )


def no_arrays() -> RetentionArrays:
    """Of no model input."""
    return RetentionArrays(
        np.zeros((0, 1), np.uint8), np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32), np.zeros((0, 2, 3))
    )
