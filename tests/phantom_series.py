"""Small synthetic CT and MR series with known shapes, and the faults that real ones have.

Everything is made from numbers: the same `PhantomSeries` gives the same bytes. Knows nothing of the project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

AIR_HU, LUNG_HU, BODY_HU, LESION_HU, BONE_HU = -1000, -800, 40, 120, 700

# The encoder that each compressed syntax is written with.
ENCODERS = {JPEG2000Lossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", RLELossless: "pydicom"}


@dataclass(frozen=True)
class PhantomSeries:
    """One series and its faults; without arguments, an axial CT that dciodvfy finds no error in."""

    study: int = 1  # same number, same Study Instance UID
    series: int = 1
    modality: str = "CT"  # or "MR"
    rows: int = 64
    columns: int = 64
    slices: int = 12
    pixel_spacing_mm: float = 5.0
    slice_spacing_mm: float = 5.0
    tilt_degrees: float = 0.0  # gantry tilt: rows lean while positions stay along the table
    transfer_syntax: str = ExplicitVRLittleEndian
    patient_name: str = "Phantom^Test"
    patient_id: str = "PHANTOM-1"
    charset: str | None = "ISO_IR 100"
    accession_number: str = "ACC-1"
    study_description: str = "Synthetic phantom"
    series_description: str = "Axial"
    gap_after: int | None = None  # the slices behind this index lie one spacing further away
    duplicate_position: int | None = None  # the slice behind this index lies where this one lies
    mixed_orientation: bool = False  # the last slice is coronal
    localizer: bool = False  # every slice is a coronal localizer
    rescale: bool = True  # False: no Rescale Slope and Intercept, as in a broken CT
    reversed_numbers: bool = False  # Instance Number falls where the position rises

    @property
    def study_uid(self) -> str:
        return _uid("study", self.study)

    @property
    def series_uid(self) -> str:
        return _uid("series", self.study, self.series)

    def instance_uid(self, index: int) -> str:
        """SOP Instance UID of the slice at `index`, counted from the feet."""
        return _uid("instance", self.study, self.series, index)

    def voxels(self) -> NDArray[np.int16]:
        """(slices, rows, columns) in HU for CT, in arbitrary units from 0 for MR; from the feet to the head.

        An elliptical body with two lungs, a spine and one round lesion in the middle slice, in front of the
        spine; a little noise.
        """
        y, x = np.mgrid[-1 : 1 : self.rows * 1j, -1 : 1 : self.columns * 1j]
        z = np.linspace(-1, 1, self.slices) if self.slices > 1 else np.zeros(1)
        voxels = np.full((self.slices, self.rows, self.columns), AIR_HU, dtype=np.int16)
        voxels[:, (x / 0.85) ** 2 + (y / 0.65) ** 2 < 1] = BODY_HU
        for side in (-1, 1):
            for index in range(self.slices):
                radius = 0.3 + 0.1 * z[index]
                voxels[index, (x - side * 0.42) ** 2 + (y / 1.4) ** 2 < radius**2] = LUNG_HU
        voxels[:, x**2 + (y - 0.45) ** 2 < 0.1**2] = BONE_HU
        middle = self.slices // 2
        voxels[middle, x**2 + (y + 0.05) ** 2 < 0.12**2] = LESION_HU
        noise = np.random.default_rng([self.study, self.series]).normal(0, 8, voxels.shape)
        noisy = np.clip(voxels + noise, -1024, 3071).astype(np.int16)
        return noisy if self.modality == "CT" else (noisy + np.int16(1024)) // np.int16(4)

    def datasets(self) -> list[FileDataset]:
        """One data set per slice, from the feet to the head, encoded in the series' transfer syntax."""
        voxels = self.voxels()
        return [self._dataset(index, voxels[index]) for index in range(self.slices)]

    def write(self, folder: Path) -> list[Path]:
        """Write the series as Part 10 files into `folder` (made where needed); return their paths in order."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index, dataset in enumerate(self.datasets()):
            path = folder / f"{self.study:03d}-{self.series:03d}-{index:04d}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            paths.append(path)
        return paths

    def position_mm(self, index: int) -> tuple[float, float, float]:
        """Image Position (Patient) of the slice at `index`, its faults applied."""
        step = float(index)
        if self.duplicate_position is not None and index == self.duplicate_position + 1:
            step -= 1
        if self.gap_after is not None and index > self.gap_after:
            step += 1
        corner = -self.pixel_spacing_mm * (self.columns - 1) / 2, -self.pixel_spacing_mm * (self.rows - 1) / 2
        return corner[0], corner[1], round(step * self.slice_spacing_mm, 6)

    def orientation(self, index: int) -> list[float]:
        """Image Orientation (Patient) of the slice at `index`, its faults applied."""
        if self.localizer or (self.mixed_orientation and index == self.slices - 1):
            return [1, 0, 0, 0, 0, -1]
        tilt = math.radians(self.tilt_degrees)
        return [1, 0, 0, 0, round(math.cos(tilt), 9), round(math.sin(tilt), 9)]

    def _dataset(self, index: int, pixels: NDArray[np.int16]) -> FileDataset:
        sop_class = CTImageStorage if self.modality == "CT" else MRImageStorage
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = sop_class
        meta.MediaStorageSOPInstanceUID = self.instance_uid(index)
        compressed = self.transfer_syntax in ENCODERS
        plain = ImplicitVRLittleEndian if self.transfer_syntax == ImplicitVRLittleEndian else ExplicitVRLittleEndian
        meta.TransferSyntaxUID = plain
        dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID = sop_class
        dataset.SOPInstanceUID = self.instance_uid(index)
        self._describe_patient_and_study(dataset)
        self._describe_series(dataset)
        self._describe_image(dataset, index)
        # PS3.3 C.7.6.3: CT is stored unsigned with an intercept, as scanners do
        stored = pixels + 1024 if self.modality == "CT" else pixels
        dataset.PixelData = stored.astype("<u2").tobytes()
        dataset["PixelData"].VR = "OW"
        if compressed:
            dataset.compress(
                self.transfer_syntax, encoding_plugin=ENCODERS[self.transfer_syntax], generate_instance_uid=False
            )
        return dataset

    def _describe_patient_and_study(self, dataset: Dataset) -> None:
        if self.charset is not None:
            dataset.SpecificCharacterSet = self.charset.split("\\")
        dataset.PatientName = self.patient_name
        dataset.PatientID = self.patient_id
        dataset.PatientBirthDate = "19700101"
        dataset.PatientSex = "O"
        dataset.StudyInstanceUID = self.study_uid
        dataset.StudyDate = "20260102"
        dataset.StudyTime = "030405"
        dataset.StudyID = str(self.study)
        dataset.StudyDescription = self.study_description
        dataset.AccessionNumber = self.accession_number
        dataset.ReferringPhysicianName = ""

    def _describe_series(self, dataset: Dataset) -> None:
        dataset.Modality = self.modality
        dataset.SeriesInstanceUID = self.series_uid
        dataset.SeriesNumber = self.series
        dataset.SeriesDescription = "Localizer" if self.localizer else self.series_description
        dataset.BodyPartExamined = "CHEST"
        dataset.PatientPosition = "HFS"
        dataset.FrameOfReferenceUID = _uid("frame of reference", self.study)
        dataset.PositionReferenceIndicator = ""
        dataset.Manufacturer = "Synthetic"
        dataset.ManufacturerModelName = "Phantom"

    def _describe_image(self, dataset: Dataset, index: int) -> None:
        kind = "LOCALIZER" if self.localizer else "AXIAL" if self.modality == "CT" else "OTHER"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", kind]
        dataset.InstanceNumber = self.slices - index if self.reversed_numbers else index + 1
        dataset.AcquisitionNumber = 1
        dataset.AcquisitionDate = dataset.ContentDate = "20260102"
        dataset.AcquisitionTime = dataset.ContentTime = "030405"
        dataset.PixelSpacing = [self.pixel_spacing_mm] * 2
        dataset.SliceThickness = self.slice_spacing_mm
        dataset.ImagePositionPatient = list(self.position_mm(index))
        dataset.ImageOrientationPatient = self.orientation(index)
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.Rows = self.rows
        dataset.Columns = self.columns
        dataset.BitsAllocated = 16
        dataset.BitsStored = 12
        dataset.HighBit = 11
        dataset.PixelRepresentation = 0
        if self.modality == "CT":
            dataset.KVP = 120
            if self.rescale:
                dataset.RescaleIntercept = -1024
                dataset.RescaleSlope = 1
                dataset.RescaleType = "HU"
            dataset.WindowCenter = 40
            dataset.WindowWidth = 400
        else:
            dataset.ScanningSequence = "SE"
            dataset.SequenceVariant = "NONE"
            dataset.ScanOptions = ""
            dataset.MRAcquisitionType = "2D"
            dataset.RepetitionTime = 500
            dataset.EchoTime = 15
            dataset.EchoTrainLength = 1


def _uid(*parts: str | int) -> str:
    return str(generate_uid(entropy_srcs=["medpruner-pacs phantom", *map(str, parts)]))
