"""A made-up analysis of a made-up study, from which the conformance statement reads what our objects hold.

Nothing in here was measured on anything. Values are invented; attributes and codes are those of real results.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from service.report.encapsulated import build_pdf
from service.report.identity import PriorDocument, RelatedObject, RunIdentity
from service.report.key_objects import build_key_objects
from service.report.parametric_map import build_parametric_map
from service.report.pixels import SourceFrame
from service.report.retention_map import build_secondary_capture
from service.report.segmentation import build_segmentation
from service.report.source import Checked, SourceInstance, SourceStudy
from service.report.structured_report import SOP_CLASSES, build_sr
from service.report.text_report import build_text_report
from service.shared import messages
from service.shared.messages import AnalysisOutput, RetentionArrays
from service.shared.settings import Companion, ReportSettings, SrSopClass

_SHAPE = (128, 128)
_DIGEST = "0" * 64
_STUDY = "2.25.11"
_NAMES = {
    Companion.KOS: "Key objects",
    Companion.SC: "Retention map",
    Companion.SEG: "Retention mask",
    Companion.PM: "Attention map",
    Companion.PDF: "Printed report",
}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What decides which attributes a result has."""

    settings: ReportSettings
    complete_source: bool = True
    follows_another: bool = True


def results(circumstances: Circumstances) -> dict[str, Dataset]:
    """One of each kind of object, by its name in the statement."""
    source, output, arrays, settings = _source(circumstances), _output(), _arrays(), circumstances.settings
    prior = (PriorDocument(SOP_CLASSES[SrSopClass.COMPREHENSIVE_3D], "2.25.41", "2.25.42", _STUDY),)
    run = RunIdentity(
        ("example",),
        datetime(2026, 1, 1, 12, 0, tzinfo=UTC),
        "0.1.0",
        predecessors=prior if circumstances.follows_another else (),
    )
    frames = [
        SourceFrame(
            one.sop_instance_uid,
            None,
            np.full(_SHAPE, 128, np.uint8),
            (0.0, 0.0, 3.0 * place),
            (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            (0.5, 0.5),
        )
        for place, one in enumerate(source.instances)
    ]
    companions: dict[Companion, Dataset] = {
        Companion.SC: build_secondary_capture(output, arrays, source, frames, settings, run=run),
        Companion.KOS: build_key_objects(output, source, settings, run=run),
        Companion.PDF: build_pdf(output, arrays, source, {}, settings, run=run),
    }
    if "FrameOfReferenceUID" in source.series:
        companions[Companion.SEG] = build_segmentation(output, arrays, source, frames, _SHAPE, settings, run=run)
        companions[Companion.PM] = build_parametric_map(output, arrays, source, frames, settings, run=run)
    related = [
        RelatedObject(companion, one.SOPClassUID, one.SOPInstanceUID, one.SeriesInstanceUID)
        for companion, one in companions.items()
    ]
    objects = {
        "Structured Report (TID 1500)": build_sr(
            output, source, settings, SrSopClass.COMPREHENSIVE_3D, run=run, related=related
        ),
        "Basic Text SR (TID 2000)": build_text_report(output, source, settings, run=run, related=related),
    }
    return objects | {_NAMES[companion]: one for companion, one in companions.items()}


def _source(circumstances: Circumstances) -> SourceStudy:
    instances = tuple(
        SourceInstance(CTImageStorage, f"2.25.10{number}", "2.25.12", Path(f"{number}.dcm")) for number in range(2)
    )
    required = dict.fromkeys(
        (
            "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
            "AccessionNumber", "ReferringPhysicianName",
        ),
        "",
    )  # fmt: skip
    if not circumstances.complete_source:
        series: Checked = {"FrameOfReferenceUID": "2.25.13"}
        return SourceStudy(_STUDY, required, {}, series, (), instances, 0, ())
    code: Checked = {"CodeValue": "C", "CodingSchemeDesignator": "99SITE", "CodeMeaning": "Site code"}
    copied = {
        "PatientName": "Example^Patient",
        "PatientID": "P",
        "PatientBirthDate": "19700101",
        "PatientSex": "O",
        "StudyDate": "20260101",
        "StudyTime": "110000",
        "StudyID": "S",
        "AccessionNumber": "A",
        "ReferringPhysicianName": "Example^Referrer",
        "TimezoneOffsetFromUTC": "+0000",
        "IssuerOfPatientID": "I",
        "PatientBirthTime": "0000",
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "Example",
        "PatientAge": "056Y",
        "StudyDescription": "Example study",
    }
    equipment = {
        "Manufacturer": "Scanner maker",
        "ManufacturerModelName": "Scanner",
        "DeviceSerialNumber": "1",
        "SoftwareVersions": "1",
        "InstitutionName": "Example Hospital",
        "StationName": "CT1",
    }
    series_of_source = {
        "FrameOfReferenceUID": "2.25.13",
        "BodyPartExamined": "CHEST",
        "SliceThickness": "3",
    }
    request: Checked = {
        "StudyInstanceUID": _STUDY,
        "AccessionNumber": "A",
        "RequestedProcedureID": "R",
        "RequestedProcedureDescription": "Example",
        "RequestedProcedureCodeSequence": (code,),
    }
    attributes: Checked = copied | {"DeidentificationMethodCodeSequence": (code,)}
    return SourceStudy(_STUDY, attributes, equipment, series_of_source, (request,), instances, 0, ())


def _output() -> AnalysisOutput:
    inputs = (
        messages.ModelInput(
            index=0, operation=messages.SliceOperation.SINGLE, source_instances=(0,), position_mm=0, kept=True
        ),
        messages.ModelInput(
            index=1,
            operation=messages.SliceOperation.SINGLE,
            source_instances=(1,),
            position_mm=3,
            kept=False,
            represented_by=0,
        ),
    )
    sources = tuple(
        messages.SourceInstance(sop_instance_uid=f"2.25.10{place}", position_mm=3 * place, state=state, input_index=0)
        for place, state in enumerate((messages.SourceState.SHOWN, messages.SourceState.REPRESENTED))
    )
    return AnalysisOutput(
        analysis_id=1,
        study_uid=_STUDY,
        series_uid="2.25.12",
        modality="CT",
        frame_of_reference_uid="2.25.13",
        series_reason="the only series",
        candidates=(),
        findings="Example finding.",
        impression="Example impression.",
        raw_text="",
        answers=_answers(),
        flags=tuple(messages.Flag),
        notes=(),
        limitations=("Example limit.",),
        model=messages.ModelIdentity(
            name="example",
            architecture="Example",
            path="",
            weights_sha256=_DIGEST,
            transformers_version="0",
            torch_version="0",
            dtype="float32",
            device="cpu",
            attention="sdpa",
        ),
        prompt="",
        max_new_tokens=1,
        pruning={
            "method": "medpruner",
            "slice_stage": True,
            "token_stage": True,
            "gamma": 0.05,
            "tau": 0.9,
            "temperature": 2.0,
            "contextual_fraction": 0.05,
        },
        preprocessing={},
        counts=messages.Counts(
            slices_in_series=2,
            slices_readable=2,
            slices_sampled=2,
            inputs=2,
            inputs_kept=1,
            tokens_in=8,
            tokens_kept=2,
            tokens_merged=0,
            tokens_text=1,
            tokens_generated=1,
        ),
        timings_s={},
        memory_peak_bytes=0,
        software_version="0.1.0",
        retention=messages.Retention(sources=sources, inputs=inputs, token_rows=2, token_columns=2),
        arrays_sha256=_DIGEST,
    )


def _answers() -> tuple[messages.ClosedAnswer, ...]:
    """A finding that was found on the first input, so that every item of a coded finding is there."""
    nodule, aspect = messages.FindingName.NODULE, messages.Aspect
    return tuple(
        messages.ClosedAnswer(
            finding=nodule, aspect=one, question="", answers=(chosen, "other"), probabilities=(0.9, 0.1)
        )
        for one, chosen in (
            (aspect.PRESENCE, "yes"),
            (aspect.SIDE, "right"),
            (aspect.ZONE, "upper"),
            (aspect.DIAMETER_MM, "12"),
            (aspect.SLICE, "1"),
        )
    )


def _arrays() -> RetentionArrays:
    scale = np.array([[_SHAPE[1] / 2, 0, 0], [0, _SHAPE[0] / 2, 0]])
    return RetentionArrays(
        tokens=np.array([[0, 2, 2, 0], [3, 3, 3, 3]], np.uint8),
        merged_into=np.full((2, 4), -1, np.int32),
        scores=np.ones((2, 4), np.float32),
        source_pixels_from_token=np.stack([scale, scale]),
    )
