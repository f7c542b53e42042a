"""workers.preprocess with method `guarded`: thin slices become slabs, and none is left out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.shared.messages import SliceOperation, SourceState
from service.shared.settings import PruningSettings, SeriesSettings
from tests.phantom_series import PhantomSeries
from workers.headers import read_headers
from workers.preprocess import Prepared, combine, prepare, slabs, to_grey
from workers.volume import Volume, load


def volume_of(folder: Path, **changes: object) -> Volume:
    series = PhantomSeries(**changes)  # type: ignore[arg-type]
    return load(read_headers(series.write(folder)), SeriesSettings(decode_memory_gb=2))


def prepared(volume: Volume, max_slices: int = 85, **knobs: object) -> Prepared:
    return prepare(
        volume,
        SeriesSettings(max_slices=max_slices),
        PruningSettings.model_validate({"method": "guarded", "slab_mm": 4.0} | knobs),
    )


@given(st.integers(1, 2000), st.floats(0.3, 12), st.floats(0, 12), st.integers(1, 120))
def test_slabs_hold_every_slice_once(slices: int, slice_mm: float, slab_mm: float, at_most: int) -> None:
    """In order, without gap or overlap, as many as allowed at most, numbers of slices differing by one."""
    made = slabs(slices, slice_mm, slab_mm, at_most)

    assert len(made) <= at_most
    assert (made[0].first, made[-1].last) == (0, slices)
    assert all(one.last == other.first for one, other in pairwise(made))
    sizes = [slab.last - slab.first for slab in made]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    if -(-slices // max(1, int(slab_mm / slice_mm + 1e-3))) <= at_most:
        assert max(sizes) == 1 or max(sizes) * slice_mm <= slab_mm + 1e-2


def test_thin_slices_are_averaged_and_stand_in_the_record(tmp_path: Path) -> None:
    """Twelve slices of 2 mm become six inputs of 4 mm; every instance is in a slab."""
    volume = volume_of(tmp_path, slice_spacing_mm=2.0)

    made = prepared(volume)

    assert [one.source_instances for one in made.inputs] == [(2 * i, 2 * i + 1) for i in range(6)]
    assert {one.operation for one in made.inputs} == {SliceOperation.MEAN}
    assert [one.position_mm for one in made.inputs] == volume.positions_mm.reshape(6, 2).mean(axis=1).tolist()
    assert [(s.state, s.input_index) for s in made.sources] == [(SourceState.IN_SLAB, i // 2) for i in range(12)]
    assert np.array_equal(made.pixels[3, ..., 0], to_grey(volume.voxels[6:8].mean(axis=0), -1024, 1024))
    assert (made.applied["slab_slices"], made.applied["slab_mm"]) == (2, 4.0)


def test_maximum_keeps_the_brightest(tmp_path: Path) -> None:
    """slab_operation mip."""
    volume = volume_of(tmp_path, slice_spacing_mm=2.0)

    made = prepared(volume, slab_operation="mip")

    assert {one.operation for one in made.inputs} == {SliceOperation.MIP}
    assert np.array_equal(made.pixels[0, ..., 0], to_grey(volume.voxels[:2].max(axis=0), -1024, 1024))


def test_thick_slices_stay_single(tmp_path: Path) -> None:
    """A series of 5 mm has nothing to average, and its images are those of every other method."""
    volume = volume_of(tmp_path)

    made = prepared(volume)

    assert {one.operation for one in made.inputs} == {SliceOperation.SINGLE}
    assert {source.state for source in made.sources} == {SourceState.SHOWN}
    assert np.array_equal(made.pixels, prepare(volume, SeriesSettings()).pixels)


def test_more_slices_than_allowed_become_thicker_slabs(tmp_path: Path) -> None:
    """Of twelve thick slices at most five inputs are made: none is left out, some are averaged."""
    made = prepared(volume_of(tmp_path), max_slices=5)

    assert len(made.inputs) == 5
    assert sorted(index for one in made.inputs for index in one.source_instances) == list(range(12))


def test_other_methods_leave_slices_as_they_are(tmp_path: Path) -> None:
    """medpruner and off sample; only `guarded` makes slabs."""
    volume = volume_of(tmp_path, slice_spacing_mm=1.0)

    for method in ("medpruner", "off"):
        made = prepare(volume, SeriesSettings(), PruningSettings.model_validate({"method": method}))
        assert {one.operation for one in made.inputs} == {SliceOperation.SINGLE}


def test_one_slice_is_its_own_mean() -> None:
    """Bit for bit, whatever the operation."""
    image = np.random.default_rng(0).normal(size=(1, 4, 4)).astype(np.float32)

    for operation in SliceOperation:
        assert np.array_equal(combine(image, operation), image[0])


@pytest.mark.parametrize("changes", [{}, {"modality": "MR"}, {"slices": 8, "slice_spacing_mm": 1.0}])
def test_guide_of_any_series_fits_its_inputs(tmp_path: Path, changes: dict[str, object]) -> None:
    """One answer per input and token, positions in stack order."""
    volume = volume_of(tmp_path, **changes)
    made = prepared(volume)

    guide = made.guide(volume)

    tokens = guide.on_grid(7, 7)
    assert tokens.body.shape == (len(made.inputs), 49)
    assert tokens.body.any()
    assert (np.diff(guide.positions_mm) > 0).all()
