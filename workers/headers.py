"""DICOM files -> headers: what selection, geometry and decoding need to know, frame by frame.

Tolerant: a missing, empty or malformed value is None. Knows nothing of pixels, and takes no patient attribute.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

_UID_DEFLATED = DeflatedExplicitVRLittleEndian.encode()
MAX_INFLATED_BYTES = 2**29  # of a deflated data set: twelve such files fill a small worker, one does not

# What pydicom raises on values and structures that the Standard does not allow.
UNREADABLE = (
    InvalidDicomError, BytesLengthException, AttributeError, EOFError, IndexError, KeyError, LookupError,
    NotImplementedError, OSError, OverflowError, RecursionError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class InstanceHeader:
    """One image: an instance, or one frame of a multi-frame instance. None: absent or not understood."""

    path: Path
    readable: bool = True  # False: the file is no DICOM object that can be parsed; everything else is empty
    sop_instance_uid: str = ""
    sop_class_uid: str = ""
    series_uid: str = ""
    transfer_syntax_uid: str = ""
    modality: str = ""
    scanner: str = ""  # Manufacturer's Model Name and Station Name
    protocol: str = ""  # Protocol Name
    series_number: int | None = None
    instance_number: int | None = None
    image_type: tuple[str, ...] = ()  # upper case; of a frame: Frame Type
    frame_number: int | None = None  # 1-based; None for a single-frame instance
    number_of_frames: int = 1
    rows: int | None = None
    columns: int | None = None
    samples_per_pixel: int | None = None
    bits_allocated: int | None = None
    bits_stored: int | None = None
    pixel_representation: int | None = None  # 0 unsigned, 1 two's complement
    photometric_interpretation: str = ""
    compressed_with_loss: bool = False
    pixel_padding_value: int | None = None
    pixel_padding_range_limit: int | None = None
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    rescale_type: str = ""
    orientation: tuple[float, ...] | None = None  # 6 direction cosines: along a row, down a column
    position: tuple[float, ...] | None = None  # 3, mm: centre of the first pixel
    pixel_spacing: tuple[float, ...] | None = None  # mm between rows, between columns
    slice_thickness: float | None = None
    frame_of_reference_uid: str | None = None
    kernel: str = ""
    # Which volume of a series that holds several at the same positions (phases, echoes, b-values)
    acquisition_number: int | None = None
    temporal_position: int | None = None
    stack_id: str = ""
    echo_time_ms: float | None = None
    b_value: float | None = None


# Attributes of the instance, then those that functional groups may hold per frame (PS3.3 C.7.6.16).
_INSTANCE_KEYWORDS = (
    "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "InstanceNumber", "ImageType",
    "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation",
    "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit", "FrameOfReferenceUID",
    "LossyImageCompression", "ManufacturerModelName", "StationName", "ProtocolName",
)  # fmt: skip
_FRAME_KEYWORDS = (
    "FrameType", "RescaleSlope", "RescaleIntercept", "RescaleType", "ImageOrientationPatient",
    "ImagePositionPatient", "PixelSpacing", "SliceThickness", "ConvolutionKernel", "AcquisitionNumber",
    "FrameAcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "StackID", "EchoTime",
    "EffectiveEchoTime", "DiffusionBValue",
)  # fmt: skip
_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")


def read_headers(paths: Iterable[Path]) -> tuple[InstanceHeader, ...]:
    """Read every file without its pixels; a multi-frame instance gives one header per frame.

    A file that cannot be parsed gives one header with `readable` False, so that it is counted and explained.
    """
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values
        return tuple(header for path in paths for header in _read(Path(path)))


def _read(path: Path) -> Iterator[InstanceHeader]:
    try:
        if not _inflates_within(path, MAX_INFLATED_BYTES):
            yield InstanceHeader(path, readable=False)
            return
        tags: list[Any] = [*_INSTANCE_KEYWORDS, *_FRAME_KEYWORDS, *_GROUPS]
        dataset = dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except UNREADABLE:
        yield InstanceHeader(path, readable=False)
        return
    frames = _sequence(dataset, _GROUPS[0])
    if not frames:
        yield _header(path, dataset, [dataset], None)
        return
    shared = [group for item in _sequence(dataset, _GROUPS[1])[:1] for group in _groups(item)]
    for number, item in enumerate(frames, start=1):
        yield _header(path, dataset, [*_groups(item), *shared, dataset], number)


def _header(path: Path, dataset: Dataset, groups: Sequence[Dataset], frame_number: int | None) -> InstanceHeader:
    meta = getattr(dataset, "file_meta", Dataset())

    def of_frame(keyword: str) -> Dataset:
        """The first of the frame's groups that has the attribute; per frame before shared before instance."""
        return next((group for group in groups if keyword in group), dataset)

    return InstanceHeader(
        path=path,
        sop_instance_uid=_text(dataset, "SOPInstanceUID") or _text(meta, "MediaStorageSOPInstanceUID"),
        sop_class_uid=_text(dataset, "SOPClassUID") or _text(meta, "MediaStorageSOPClassUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        transfer_syntax_uid=_text(meta, "TransferSyntaxUID"),
        modality=_text(dataset, "Modality").upper(),
        scanner=" ".join(filter(None, (_text(dataset, "ManufacturerModelName"), _text(dataset, "StationName")))),
        protocol=_text(dataset, "ProtocolName"),
        series_number=_integer(dataset, "SeriesNumber"),
        instance_number=_integer(dataset, "InstanceNumber"),
        image_type=tuple(
            word.upper() for word in _texts(of_frame("FrameType"), "FrameType") or _texts(dataset, "ImageType")
        ),
        frame_number=frame_number,
        number_of_frames=max(1, _integer(dataset, "NumberOfFrames") or 1),
        rows=_integer(dataset, "Rows"),
        columns=_integer(dataset, "Columns"),
        samples_per_pixel=_integer(dataset, "SamplesPerPixel"),
        bits_allocated=_integer(dataset, "BitsAllocated"),
        bits_stored=_integer(dataset, "BitsStored"),
        pixel_representation=_integer(dataset, "PixelRepresentation"),
        photometric_interpretation=_text(dataset, "PhotometricInterpretation").upper(),
        compressed_with_loss=_text(dataset, "LossyImageCompression") == "01",
        pixel_padding_value=_integer(dataset, "PixelPaddingValue"),
        pixel_padding_range_limit=_integer(dataset, "PixelPaddingRangeLimit"),
        rescale_slope=_number(of_frame("RescaleSlope"), "RescaleSlope"),
        rescale_intercept=_number(of_frame("RescaleIntercept"), "RescaleIntercept"),
        rescale_type=_text(of_frame("RescaleType"), "RescaleType").upper(),
        orientation=_orientation(_numbers(of_frame("ImageOrientationPatient"), "ImageOrientationPatient", 6)),
        position=_numbers(of_frame("ImagePositionPatient"), "ImagePositionPatient", 3),
        pixel_spacing=_spacing(_numbers(of_frame("PixelSpacing"), "PixelSpacing", 2)),
        slice_thickness=_number(of_frame("SliceThickness"), "SliceThickness"),
        frame_of_reference_uid=_text(dataset, "FrameOfReferenceUID") or None,
        kernel=" ".join(_texts(of_frame("ConvolutionKernel"), "ConvolutionKernel")[:1]),
        acquisition_number=_either(of_frame, _integer, "FrameAcquisitionNumber", "AcquisitionNumber"),
        temporal_position=_either(of_frame, _integer, "TemporalPositionIndex", "TemporalPositionIdentifier"),
        stack_id=_text(of_frame("StackID"), "StackID"),
        echo_time_ms=_either(of_frame, _number, "EffectiveEchoTime", "EchoTime"),
        b_value=_number(of_frame("DiffusionBValue"), "DiffusionBValue"),
    )


def _groups(item: Dataset) -> list[Dataset]:
    """The first item of every functional group macro of one frame."""
    try:
        return [first for element in item if element.VR == "SQ" for first in list(element.value)[:1]]
    except UNREADABLE:
        return []


def _either(of_frame: Any, read: Any, enhanced: str, classic: str) -> Any:
    value = read(of_frame(enhanced), enhanced)
    return read(of_frame(classic), classic) if value is None else value


def _value(dataset: Dataset, keyword: str) -> Any:
    try:
        return dataset.get(keyword)
    except UNREADABLE:
        return None


def _sequence(dataset: Dataset, keyword: str) -> list[Dataset]:
    value = _value(dataset, keyword)
    return list(value) if isinstance(value, DicomSequence) else []


def _texts(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    value = _value(dataset, keyword)
    if value is None or isinstance(value, DicomSequence | bytes):
        return ()
    parts = value if isinstance(value, MultiValue | list) else str(value).split("\\")
    return tuple(text for part in parts if (text := str(part).strip(" \0")))


def _text(dataset: Dataset, keyword: str) -> str:
    return "\\".join(_texts(dataset, keyword))


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(text) for text in _texts(dataset, keyword))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(math.isfinite(number) for number in numbers) else None


def _number(dataset: Dataset, keyword: str) -> float | None:
    numbers = _numbers(dataset, keyword, 1)
    return numbers[0] if numbers else None


def _integer(dataset: Dataset, keyword: str) -> int | None:
    number = _number(dataset, keyword)
    return int(number) if number is not None and number == int(number) else None


def _orientation(cosines: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Two unit vectors at right angles, as exactly as a scanner writes them; anything else is None."""
    if cosines is None:
        return None
    row, column = cosines[:3], cosines[3:]
    lengths = [math.hypot(*row), math.hypot(*column)]
    across = sum(a * b for a, b in zip(row, column, strict=True))
    if any(abs(length - 1) > 0.02 for length in lengths) or abs(across) > 0.02:
        return None
    return tuple(c / lengths[0] for c in row) + tuple(c / lengths[1] for c in column)


def _spacing(spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return spacing if spacing and min(spacing) > 0 else None


def _inflates_within(path: Path, limit_bytes: int) -> bool:
    """Whether a deflated data set unpacks to no more than `limit_bytes`; True for any other transfer syntax.

    pydicom would unpack all of it in memory, and 100 kB can hold 100 MB.
    """
    with path.open("rb") as stream:
        start = stream.read(4096)
        if _UID_DEFLATED not in start:
            return True
        if start[132:138] != b"\x02\x00\x00\x00UL":
            return False  # deflated and without a group length: where the data set begins is a guess
        end = 144 + struct.unpack("<I", start[140:144])[0]
        if _UID_DEFLATED not in start[144:end]:
            return True
        stream.seek(end)
        inflater, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while (chunk := inflater.unconsumed_tail or stream.read(2**16)) and not inflater.eof:
            inflated += len(inflater.decompress(chunk, 2**20))
            if inflated > limit_bytes:
                return False
    return True
