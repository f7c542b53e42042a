"""A real volume becomes what the demonstration model was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.shared.messages import SliceOperation, SourceState
from service.shared.settings import SeriesSettings
from workers.demo_model.channels import THIRD_CHANNEL
from workers.demo_model.dicom_series import write_series
from workers.demo_model.inputs import prepare_for_demonstration
from workers.demo_model.phantom import Phantom, Protocol, generate
from workers.demo_model.pool import images_of
from workers.headers import read_headers
from workers.volume import Volume, load

WANTED = {
    "slabs": 24,
    "pixels": 60,
    "windows_hu": [[-1024, 1024], [-135, 215]],
    "third_channel": THIRD_CHANNEL,
}


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return generate(11, Protocol(pixels=96, slice_mm=6.0))


@pytest.fixture(scope="module")
def volume(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Volume:
    paths: tuple[Path, ...] = write_series(phantom, tmp_path_factory.mktemp("series"))
    return load(read_headers(paths), SeriesSettings())


def test_inputs_are_those_of_the_training(phantom: Phantom, volume: Volume) -> None:
    """Written as DICOM, read back and prepared, a phantom gives the very images that its accuracy was measured on."""
    prepared = prepare_for_demonstration(volume, SeriesSettings(), WANTED | {"pixels": 120})

    assert np.array_equal(prepared.pixels, images_of(phantom))
    assert prepared.applied["blob_voxel_mm"][0] == pytest.approx(6.0 * len(phantom.values) / 48, abs=0.01)


def test_every_slice_is_in_a_slab(volume: Volume) -> None:
    """Nothing is left out, and each slab names its slices in order."""
    prepared = prepare_for_demonstration(volume, SeriesSettings(), WANTED)

    assert len(prepared.inputs) == 24
    assert [index for one in prepared.inputs for index in one.source_instances] == list(range(len(volume.voxels)))
    assert {source.state for source in prepared.sources} <= {SourceState.IN_SLAB, SourceState.SHOWN}
    assert {one.operation for one in prepared.inputs} <= {SliceOperation.MEAN, SliceOperation.SINGLE}


def test_tokens_lie_on_the_source_grid(volume: Volume) -> None:
    """The last token ends at the last pixel of the source, however few pixels the model gets."""
    affine = prepare_for_demonstration(volume, SeriesSettings(), WANTED).source_pixels_from_token(6, 6)

    assert np.allclose(affine[0] @ [0, 0, 1], [0, 0])
    assert np.allclose(affine[-1] @ [6, 6, 1], [96, 96])


def test_magnetic_resonance_gets_one_channel_thrice(volume: Volume) -> None:
    """The blob channel is of Hounsfield units; other modalities are scaled by their own values."""
    prepared = prepare_for_demonstration(replace(volume, modality="MR"), SeriesSettings(), WANTED)

    assert np.array_equal(prepared.pixels[..., 0], prepared.pixels[..., 2])
    assert prepared.applied["third_channel"] == "as the first"
