"""A phantom as a CT or MR series in Part 10 files that any PACS takes. No real person is in it, and it says so."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from workers.demo_model.other_bodies import Body
from workers.demo_model.phantom import Kernel, Modality, Phantom
from workers.demo_model.report_text import write

IMPLEMENTATION_UID = UID("2.25.249771862116893022934093520313817286817")
ACQUIRED = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)  # the same for all, so that the bytes are the same

_BODY_PARTS = {
    Body.CHEST: "CHEST",
    Body.ABDOMEN: "ABDOMEN",
    Body.BASES: "ABDOMEN",
    Body.PELVIS: "PELVIS",
    Body.HEAD: "HEAD",
}
_LATERALITIES = {Body.LEGS: "B", Body.OBJECT: "U"}  # both of a pair; an object is no body part


def write_series(phantom: Phantom, folder: Path, *, acquired: datetime = ACQUIRED) -> tuple[Path, ...]:
    """Write one file per slice, head first, named 0001.dcm and so on; the same phantom gives the same bytes.

    UIDs are derived from seed, body, modality and the shape of the grid, so that two protocols of one seed are two
    studies of the same patient.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(len(phantom.values)):
        path = folder / f"{index + 1:04d}.dcm"
        _slice(phantom, index, acquired).save_as(path, enforce_file_format=True)
        paths.append(path)
    return tuple(paths)


def write_truth(phantom: Phantom, path: Path) -> None:
    """The labels, and a report that states them, as JSON."""
    truth = {"seed": phantom.seed, "labels": asdict(phantom.labels), "report": str(write(phantom.labels))}
    path.write_text(json.dumps(truth, indent=2) + "\n")


def series_uid(phantom: Phantom) -> UID:
    return _uid(phantom, "series")


def study_uid(phantom: Phantom) -> UID:
    return _uid(phantom, "study")


def _uid(phantom: Phantom, *of: object) -> UID:
    shape = "x".join(map(str, phantom.values.shape))
    identity = ["medpruner-pacs phantom", str(phantom.seed), phantom.body.value, phantom.modality.value, shape]
    return generate_uid(prefix="2.25.", entropy_srcs=[*identity, *map(str, of)])


def _slice(phantom: Phantom, index: int, acquired: datetime) -> FileDataset:
    storage = CTImageStorage if phantom.modality is Modality.CT else MRImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = _uid(phantom, "instance", index)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = storage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    _patient_and_study(dataset, phantom, acquired)
    _series_and_equipment(dataset, phantom, acquired)
    _plane(dataset, phantom, index)
    _pixels(dataset, phantom, index)
    if phantom.modality is Modality.CT:
        _ct(dataset, phantom)
    else:
        _mr(dataset)
    return dataset


def _patient_and_study(dataset: Dataset, phantom: Phantom, acquired: datetime) -> None:
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.PatientName = f"PHANTOM^{phantom.seed}"
    dataset.PatientID = f"PHANTOM-{phantom.seed}"
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "O"
    dataset.PatientComments = "Computed phantom, no person"
    dataset.StudyInstanceUID = study_uid(phantom)
    dataset.StudyDate = acquired.strftime("%Y%m%d")
    dataset.StudyTime = acquired.strftime("%H%M%S")
    dataset.StudyID = str(phantom.seed)[-16:]
    dataset.AccessionNumber = f"PH{phantom.seed}"[:16]
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = f"Phantom {phantom.body.value}"


def _series_and_equipment(dataset: Dataset, phantom: Phantom, acquired: datetime) -> None:
    dataset.Modality = phantom.modality.value
    dataset.SeriesInstanceUID = series_uid(phantom)
    dataset.SeriesNumber = 1
    dataset.SeriesDate, dataset.SeriesTime = dataset.StudyDate, dataset.StudyTime
    dataset.AcquisitionDate, dataset.AcquisitionTime = dataset.StudyDate, dataset.StudyTime
    dataset.ContentDate, dataset.ContentTime = dataset.StudyDate, dataset.StudyTime
    dataset.SeriesDescription = f"{phantom.body.value} {phantom.slice_mm:.2f} mm {phantom.kernel.value}"
    if phantom.body in _BODY_PARTS:
        dataset.BodyPartExamined = _BODY_PARTS[phantom.body]
    if phantom.body in _LATERALITIES:
        dataset.ImageLaterality = _LATERALITIES[phantom.body]
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = _uid(phantom, "frame of reference")
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = "medpruner-pacs"
    dataset.ManufacturerModelName = "phantom"
    dataset.DeviceSerialNumber = "0"
    dataset.SoftwareVersions = "1"


def _plane(dataset: Dataset, phantom: Phantom, index: int) -> None:
    """PS3.3 C.7.6.2; axes as in anatomy.py are those of DICOM."""
    rows, columns = phantom.values.shape[1:]
    left = phantom.centre_mm[0] - (columns - 1) / 2 * phantom.pixel_mm
    front = phantom.centre_mm[1] - (rows - 1) / 2 * phantom.pixel_mm
    position = (left, front, float(phantom.z_mm[index]))
    dataset.InstanceNumber = index + 1
    dataset.AcquisitionNumber = 1
    dataset.PixelSpacing = [_decimal(phantom.pixel_mm)] * 2
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    dataset.ImagePositionPatient = [_decimal(value) for value in position]
    dataset.SliceThickness = _decimal(phantom.slice_mm)
    if phantom.modality is Modality.MR:
        dataset.SpacingBetweenSlices = _decimal(phantom.slice_mm)
    dataset.SliceLocation = _decimal(position[2])


def _pixels(dataset: Dataset, phantom: Phantom, index: int) -> None:
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = phantom.values.shape[1:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.PixelData = phantom.values[index].astype("<i2").tobytes()


def _ct(dataset: Dataset, phantom: Phantom) -> None:
    """PS3.3 C.8.2.1."""
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "HU"
    dataset.KVP = "120"
    dataset.ConvolutionKernel = "SHARP" if phantom.kernel is Kernel.SHARP else "SOFT"
    dataset.WindowCenter, dataset.WindowWidth = "-500", "1500"


def _mr(dataset: Dataset) -> None:
    """PS3.3 C.8.3.1."""
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "SE", "NONE", ""
    dataset.MRAcquisitionType = "2D"
    dataset.RepetitionTime, dataset.EchoTime, dataset.EchoTrainLength = "500", "15", 1
    dataset.MagneticFieldStrength = "1.5"


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 6.2)."""
    return f"{value:.6f}"[:16]
