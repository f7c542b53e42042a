"""Series that scanners and PACSs also send: enhanced multi-frame objects, and phantoms with a header changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian

from tests.phantom_series import PhantomSeries


def write_changed(series: PhantomSeries, folder: Path, change: Callable[[int, FileDataset], None]) -> list[Path]:
    """Write `series` after `change(index, dataset)` was done to each data set."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, dataset in enumerate(series.datasets()):
        change(index, dataset)
        paths.append(folder / f"{series.series:03d}-{index:04d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_enhanced(
    series: PhantomSeries, path: Path, *, transfer_syntax: str = ExplicitVRLittleEndian, volumes: int = 1
) -> Path:
    """Write `series` as one multi-frame instance; each frame has a rescale intercept of its own.

    volumes: how often the stack is repeated, as temporal positions 1, 2 ... of the same positions.
    """
    datasets = series.datasets()
    enhanced = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    first = datasets[0]
    for keyword in (
        "PatientName", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "Rows",
        "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
        "PixelRepresentation", "FrameOfReferenceUID", "SOPInstanceUID",
    ):  # fmt: skip
        enhanced[keyword] = first[keyword]
    enhanced.SOPClassUID = EnhancedCTImageStorage if series.modality == "CT" else EnhancedMRImageStorage
    enhanced.file_meta.MediaStorageSOPClassUID = enhanced.SOPClassUID
    enhanced.file_meta.MediaStorageSOPInstanceUID = enhanced.SOPInstanceUID
    enhanced.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    enhanced.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    enhanced.InstanceNumber = 1
    enhanced.NumberOfFrames = len(datasets) * volumes
    enhanced.SharedFunctionalGroupsSequence = [_shared(first)]
    enhanced.PerFrameFunctionalGroupsSequence = [
        _frame(dataset, index, volume) for volume in range(volumes) for index, dataset in enumerate(datasets)
    ]
    enhanced.PixelData = b"".join(dataset.PixelData for dataset in datasets) * volumes
    enhanced["PixelData"].VR = "OW"
    if transfer_syntax != ExplicitVRLittleEndian:
        enhanced.compress(transfer_syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    enhanced.save_as(path, enforce_file_format=True)
    return path


def _shared(first: Dataset) -> Dataset:
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = first.PixelSpacing, first.SliceThickness
    plane.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [plane]
    return shared


def _frame(dataset: Dataset, index: int, volume: int) -> Dataset:
    place, content, kind, values, frame = Dataset(), Dataset(), Dataset(), Dataset(), Dataset()
    place.ImagePositionPatient = dataset.ImagePositionPatient
    content.StackID, content.InStackPositionNumber, content.TemporalPositionIndex = "1", index + 1, volume + 1
    kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    values.RescaleIntercept, values.RescaleSlope, values.RescaleType = -1024 - index, 1, "HU"
    frame.PlanePositionSequence = [place]
    frame.FrameContentSequence = [content]
    frame.CTImageFrameTypeSequence = [kind]
    frame.PixelValueTransformationSequence = [values]
    return frame
