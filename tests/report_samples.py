"""Analyses and source headers for the tests of service/report. Synthetic, except what tests/data/real-ct holds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from service.report.identity import RunIdentity
from service.report.source import SourceStudy
from service.shared.durable import digest
from service.shared.messages import (
    TOKEN_CODES,
    AnalysisOutput,
    Aspect,
    ClosedAnswer,
    Counts,
    FindingName,
    Flag,
    ModelIdentity,
    ModelInput,
    Retention,
    RetentionArrays,
    SeriesCandidate,
    SliceOperation,
    SourceInstance,
    SourceState,
    TokenState,
)

REAL_CT = Path(__file__).parent / "data" / "real-ct"
BODY = REAL_CT / "body-siemens"
HEAD = REAL_CT / "head-philips"

RUN = RunIdentity(
    analysis_key=("2.25.1", "1", "default", "1"),
    content_time=datetime(2026, 11, 23, 12, 30, 15, 250000, tzinfo=UTC),
    software_version="0.1.0",
    timezone=ZoneInfo("Europe/Berlin"),
)


def output_of(
    instance_uids: Sequence[str],
    *,
    study_uid: str = "2.25.11",
    series_uid: str = "2.25.12",
    modality: str = "CT",
    flags: Sequence[Flag] = (),
    findings: str = "The lungs are clear.\nNo pleural effusion.",
    impression: str = "No acute finding.",
    keep_every: int = 2,
    tokens: tuple[int, int] = (4, 4),
    arrays: RetentionArrays | None = None,
    **changes: Any,
) -> AnalysisOutput:
    """An analysis of single slices, of which the slice stage kept every `keep_every`th."""
    inputs = []
    sources = []
    for index, uid in enumerate(instance_uids):
        anchor = index - index % keep_every
        kept = anchor == index
        inputs.append(
            ModelInput(
                index=index,
                operation=SliceOperation.SINGLE,
                source_instances=(index,),
                position_mm=3.0 * index,
                kept=kept,
                represented_by=None if kept else anchor,
            )
        )
        state = SourceState.SHOWN if kept else SourceState.REPRESENTED
        sources.append(SourceInstance(sop_instance_uid=uid, position_mm=3.0 * index, state=state, input_index=anchor))
    rows, columns = tokens
    if arrays is None:
        arrays = arrays_of(tuple(inputs), tokens)
    kept_tokens = int((arrays.tokens == TOKEN_CODES[TokenState.KEPT]).sum())
    values: dict[str, Any] = {
        "analysis_id": 7,
        "study_uid": study_uid,
        "series_uid": series_uid,
        "modality": modality,
        "frame_of_reference_uid": "2.25.13",
        "series_reason": "the axial series with most slices",
        "candidates": (
            SeriesCandidate(
                series_uid=series_uid,
                modality=modality,
                instances=len(instance_uids),
                chosen=True,
                reason="the axial series with most slices",
            ),
            SeriesCandidate(series_uid="2.25.99", modality=modality, instances=1, chosen=False, reason="localizer"),
        ),
        "findings": findings,
        "impression": impression,
        "raw_text": f"Findings: {findings}\nImpression: {impression}",
        "flags": tuple(flags),
        "notes": ("Slices are 3 mm apart.",),
        "model": ModelIdentity(
            name="medgemma-1.5-4b-it",
            architecture="Gemma3ForConditionalGeneration",
            path="/models/medgemma",
            weights_sha256=digest(b"weights"),
            transformers_version="5.23.0",
            torch_version="2.13.0",
            dtype="bfloat16",
            device="cuda",
            attention="sdpa",
        ),
        "prompt": "Read the slices.",
        "max_new_tokens": 512,
        "pruning": {
            "method": "medpruner",
            "slice_stage": True,
            "token_stage": True,
            "gamma": 0.05,
            "tau": 0.9,
            "temperature": 2.0,
            "contextual_fraction": 0.05,
        },
        "preprocessing": {"windows_hu": [[-1024, 1024], [-135, 215], [0, 80]], "max_slices": 85},
        "counts": Counts(
            slices_in_series=len(instance_uids),
            slices_readable=len(instance_uids),
            slices_sampled=len(instance_uids),
            inputs=len(inputs),
            inputs_kept=sum(one.kept for one in inputs),
            tokens_in=len(inputs) * rows * columns,
            tokens_kept=kept_tokens,
            tokens_merged=0,
            tokens_text=60,
            tokens_generated=40,
        ),
        "timings_s": {"volume": 0.5, "tower": 1.5},
        "memory_peak_bytes": 1_000_000,
        "software_version": "0.1.0",
        "retention": Retention(sources=tuple(sources), inputs=tuple(inputs), token_rows=rows, token_columns=columns),
        "arrays_sha256": digest(arrays.to_npz()),
    }
    return AnalysisOutput(**(values | changes))


def answer(
    finding: FindingName | None, aspect: Aspect, chosen: str, probability: float = 0.9, other: str = "-"
) -> ClosedAnswer:
    """One answer chosen among two."""
    return ClosedAnswer(
        finding=finding,
        aspect=aspect,
        question=f"{aspect.value}?",
        answers=(other, chosen),
        probabilities=(1 - probability, probability),
    )


# What a model answers about a chest with a nodule, an effusion on both sides, and nothing else
ANSWERS = (
    answer(None, Aspect.CHEST_CT, "yes", 0.99),
    answer(FindingName.NODULE, Aspect.PRESENCE, "yes", 0.93),
    answer(FindingName.NODULE, Aspect.SIDE, "right", 0.81),
    answer(FindingName.NODULE, Aspect.ZONE, "upper", 0.7),
    answer(FindingName.NODULE, Aspect.DIAMETER_MM, "12", 0.6),
    answer(FindingName.NODULE, Aspect.SLICE, "3", 0.55),
    answer(FindingName.EFFUSION, Aspect.PRESENCE, "yes", 0.88),
    answer(FindingName.EFFUSION, Aspect.SIDE, "both", 0.75),
    answer(FindingName.CONSOLIDATION, Aspect.PRESENCE, "no", 0.97),
    answer(FindingName.CONSOLIDATION, Aspect.SIDE, "left", 0.6),
    answer(FindingName.CONSOLIDATION, Aspect.ZONE, "mid", 0.6),
    answer(FindingName.CONSOLIDATION, Aspect.SLICE, "1", 0.6),
    answer(FindingName.PNEUMOTHORAX, Aspect.PRESENCE, "no", 0.99),
    answer(FindingName.CARDIOMEGALY, Aspect.PRESENCE, "yes", 0.64),
    answer(FindingName.CALCIFICATION, Aspect.PRESENCE, "yes", 0.51),
)


def arrays_of(inputs: Sequence[ModelInput], tokens: tuple[int, int]) -> RetentionArrays:
    """Of each kept input the tokens at even places, of the others none; a token is 128 pixels wide at 4 x 4."""
    count = tokens[0] * tokens[1]
    states = np.full((len(inputs), count), TOKEN_CODES[TokenState.NOT_ENCODED], np.uint8)
    for one in inputs:
        if one.kept:
            states[one.index] = TOKEN_CODES[TokenState.DROPPED]
            states[one.index, ::2] = TOKEN_CODES[TokenState.KEPT]
    scale = np.array([[512 / tokens[1], 0, 0], [0, 512 / tokens[0], 0]])
    return RetentionArrays(
        tokens=states,
        merged_into=np.full((len(inputs), count), -1, np.int32),
        scores=np.where(states < 3, 1.0, np.nan).astype(np.float32),
        source_pixels_from_token=np.repeat(scale[None], len(inputs), axis=0),
    )


def output_for(source: SourceStudy, **changes: Any) -> AnalysisOutput:
    """An analysis of every instance of `source`, in order of UID."""
    return output_of(
        [one.sop_instance_uid for one in source.instances],
        **({"study_uid": source.study_uid, "series_uid": source.instances[0].series_uid} | changes),
    )


def ct_header(number: int = 1, **attributes: Any) -> Dataset:
    """A CT slice without pixels, complete in what results copy; None removes an attribute."""
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    header.SOPClassUID = CTImageStorage
    header.SOPInstanceUID = f"2.25.100{number}"
    header.StudyInstanceUID = "2.25.11"
    header.SeriesInstanceUID = "2.25.12"
    header.FrameOfReferenceUID = "2.25.13"
    header.Modality = "CT"
    header.PatientName = "Test^Case"
    header.PatientID = "P-1"
    header.PatientBirthDate = "19700101"
    header.PatientSex = "F"
    header.StudyDate = "20261123"
    header.StudyTime = "101500"
    header.StudyID = "S1"
    header.AccessionNumber = "A-1"
    header.ReferringPhysicianName = "Refer^Ring"
    header.StudyDescription = "CT thorax"
    header.Manufacturer = "Maker"
    for keyword, value in attributes.items():
        if value is None:
            delattr(header, keyword)
        else:
            setattr(header, keyword, value)
    return header


def write(folder: Path, headers: Sequence[Dataset]) -> list[Path]:
    """Write each header as a Part 10 file, explicit VR little endian, as it is."""
    paths = []
    for number, header in enumerate(headers):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = header.get("SOPClassUID") or CTImageStorage
        meta.MediaStorageSOPInstanceUID = header.get("SOPInstanceUID") or f"2.25.200{number}"
        header.file_meta = meta
        path = folder / f"{number:04d}.dcm"
        header.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
