"""What the model was shown, for the eye: frames of the series that was read, and the map of kept tokens.

Knows DICOM pixels and the worker's output; nothing of HTTP.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.report.coverage import cover, is_shown
from service.report.retention_map import caption, paint
from service.shared.db import Analysis, Instance
from service.shared.messages import AnalysisOutput, RetentionArrays, load_output
from service.shared.settings import Settings, spool_folder

Window = tuple[float, float]  # centre, width
CT_WINDOW_HU: Window = (40.0, 400.0)
LARGEST_FRAME_PIXELS = 4096 * 4096  # what one request may make us decode


class NotShowable(Exception):
    """There is nothing to show, for the reason in the message; it holds no patient data."""


def read_output(settings: Settings, analysis: Analysis) -> tuple[AnalysisOutput, RetentionArrays]:
    """The stored output of an analysis; NotShowable when there is none or it is not what was recorded."""
    if analysis.output_path is None or analysis.output_sha256 is None:
        raise NotShowable("this analysis has no output: it was not read")
    try:
        return load_output(settings.data.path / analysis.output_path, analysis.output_sha256)
    except FileNotFoundError as error:
        raise NotShowable("the stored output has been removed") from error
    except ValueError as error:
        raise NotShowable("the stored output does not match its recorded digest") from error


def retention_map(output: AnalysisOutput, arrays: RetentionArrays) -> dict[str, Any]:
    """Slices, model inputs and tokens as plain values; tokens as one digit each (codes of TOKEN_CODES), row-major."""
    retention = output.retention
    return {
        "modality": output.modality,
        "rows": retention.token_rows,
        "columns": retention.token_columns,
        "windows": output.preprocessing.get("windows", []),
        "sources": [
            {
                "index": index,
                "frame_number": source.frame_number,
                "position_mm": source.position_mm,
                "state": source.state.value,
                "input_index": source.input_index,
                "reason": source.reason,
            }
            for index, source in enumerate(retention.sources)
        ],
        "inputs": [
            {
                "index": one.index,
                "operation": one.operation.value,
                "sources": list(one.source_instances),
                "position_mm": one.position_mm,
                "kept": one.kept,
                "represented_by": one.represented_by,
                "tokens": "".join(map(str, arrays.tokens[one.index].tolist())),
                "source_pixels_from_token": arrays.source_pixels_from_token[one.index].tolist(),
            }
            for one in retention.inputs
        ],
        "coverage": [region.model_dump(mode="json") for region in retention.coverage],
        "candidates": [candidate.model_dump(mode="json") for candidate in output.candidates],
    }


def frame(
    session: Session, settings: Settings, analysis: Analysis, output: AnalysisOutput, index: int
) -> NDArray[np.int16]:
    """(rows, columns) int16 of one source of the retention: HU for CT, stored values after the modality LUT else.

    NotShowable when the instance is gone, damaged, or compressed in a way that this installation cannot decode.
    """
    if not 0 <= index < len(output.retention.sources):
        raise NotShowable("the series that was read has no such slice")
    source = output.retention.sources[index]
    path = _path(session, analysis, source.sop_instance_uid, spool_folder(settings))
    try:
        return _decode(path, source.frame_number)
    except FileNotFoundError as error:
        raise NotShowable("the image has been removed from the spool") from error
    except NotShowable:
        raise
    except Exception as error:  # decoders raise anything on damaged data, and quote it
        raise NotShowable(f"the image cannot be decoded here ({type(error).__name__})") from error


def map_png(
    output: AnalysisOutput, arrays: RetentionArrays, pixels: NDArray[np.int16], index: int, window: Window | None
) -> bytes:
    """One slice as a PNG with what the model was and was not given, as the Secondary Capture draws it.

    pixels: as `frame` gives them; window: centre and width, else soft tissue for CT and the 1st to 99th percentile.
    """
    source = output.retention.sources[index]
    low, high = _limits(pixels, output.modality, window)
    grey = np.clip((pixels.astype(np.float32) - low) * (255 / max(high - low, 1)), 0, 255).astype(np.uint8)
    said = caption(output.retention, source, index + 1)
    picture = paint(grey, cover(output.retention, arrays, source, grey.shape), said, is_shown(source))
    content = BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def _limits(pixels: NDArray[np.int16], modality: str, window: Window | None) -> tuple[float, float]:
    if window is None and modality == "CT":
        window = CT_WINDOW_HU
    if window is not None:
        centre, width = window
        return centre - width / 2, centre + width / 2
    low, high = np.percentile(pixels, (1, 99))
    return float(low), float(high)


def _path(session: Session, analysis: Analysis, sop_instance_uid: str, spool: Path) -> Path:
    """Of several contents under one UID the last, as the worker does."""
    found = session.scalars(
        select(Instance.path)
        .where(
            Instance.study_id == analysis.study_id,
            Instance.sop_instance_uid == sop_instance_uid,
            Instance.revision <= analysis.revision,
        )
        .order_by(Instance.received_at.desc(), Instance.id.desc())
    ).first()
    if found is None:
        raise NotShowable("the image is not on record")
    return spool / found


def _decode(path: Path, frame_number: int | None) -> NDArray[np.int16]:
    dataset = dcmread(path)
    if int(dataset.Rows) * int(dataset.Columns) > LARGEST_FRAME_PIXELS or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise NotShowable("the image is too large, or in colour")
    stored = pixel_array(dataset, index=(frame_number or 1) - 1)
    values = apply_modality_lut(stored, _with_rescale(dataset, frame_number))
    limits = np.iinfo(np.int16)
    clipped: NDArray[np.int16] = np.clip(np.rint(values), limits.min, limits.max).astype("<i2")
    return clipped


def _with_rescale(dataset: Dataset, frame_number: int | None) -> Dataset:
    """Enhanced multi-frame objects keep slope and intercept in their functional groups (PS3.3 C.7.6.16)."""
    groups = [*(dataset.get("PerFrameFunctionalGroupsSequence") or [])[(frame_number or 1) - 1 : frame_number or 1]]
    groups += dataset.get("SharedFunctionalGroupsSequence") or []
    for group in groups:
        transformation = group.get("PixelValueTransformationSequence")
        if transformation:
            return transformation[0]  # type: ignore[no-any-return]  # a Dataset, by the Standard
    return dataset
