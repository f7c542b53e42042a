"""Phantoms: the same seed gives the same bytes, and what the labels say is what the voxels show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from workers.demo_model.anatomy import Side, Zone, zone_of
from workers.demo_model.findings import Findings
from workers.demo_model.other_bodies import Body
from workers.demo_model.phantom import (
    SLABS,
    Modality,
    Phantom,
    Protocol,
    as_slabs,
    build,
    generate,
    generate_mixed,
)
from workers.demo_model.render import Mask

COARSE = Protocol(pixels=96, slices=20)


def first_with(wanted: Callable[[Findings], object], protocol: Protocol = COARSE) -> Phantom:
    """The first chest from seed 0 on that has a finding."""
    return next(p for p in (generate(seed, protocol) for seed in range(200)) if wanted(p.findings))


def centre_of(phantom: Phantom, bit: Mask) -> tuple[float, float, float]:
    """Mean x, y, z of a mask in mm."""
    z, y, x = (places.mean() for places in np.nonzero(phantom.masks & bit))
    size = phantom.masks.shape[1:]
    return (
        float((x + 0.5 - size[1] / 2) * phantom.pixel_mm + phantom.centre_mm[0]),
        float((y + 0.5 - size[0] / 2) * phantom.pixel_mm + phantom.centre_mm[1]),
        float(phantom.z_mm[0] - z * phantom.slice_mm),
    )


def test_same_seed_same_bytes() -> None:
    """A phantom is a pure function of its seed and protocol."""
    one, other = generate(7, COARSE), generate(7, COARSE)

    assert one.values.tobytes() == other.values.tobytes()
    assert one.masks.tobytes() == other.masks.tobytes()
    assert one.labels == other.labels


def test_other_seed_other_person() -> None:
    """Two seeds differ in more than noise."""
    one, other = (build(seed, COARSE) for seed in (7, 8))

    assert np.abs(one.hu - other.hu).mean() > 20


def test_finer_grid_shows_the_same_anatomy() -> None:
    """Averaged to the coarse grid, a fine rendering differs little from the coarse one."""
    coarse = build(3, Protocol(pixels=64, slices=12))
    fine = build(3, Protocol(pixels=128, slices=48))
    averaged = fine.hu.reshape(12, 4, 64, 2, 64, 2).mean(axis=(1, 3, 5))

    assert coarse.findings == fine.findings
    assert np.abs(coarse.hu - averaged).mean() < 12


def test_tissues_have_their_hounsfield_units() -> None:
    """Air outside, aerated lung, soft tissue where nothing else is."""
    phantom = next(p for p in (generate(seed, COARSE) for seed in range(200)) if p.labels.normal)
    body, lung = (phantom.masks & Mask.BODY) > 0, (phantom.masks & Mask.LUNG) > 0

    assert np.median(phantom.values[~body]) == pytest.approx(-1000, abs=15)
    assert -900 < np.median(phantom.values[lung]) < -750
    assert -110 < np.median(phantom.values[body & ~lung]) < 120


def test_nodule_is_where_its_label_says() -> None:
    """Side, zone and density of the mask agree with the label."""
    phantom = first_with(lambda f: f.nodules and f.nodules[0].diameter_mm > 12)
    (label,) = phantom.labels.nodules
    x, _, z = centre_of(phantom, Mask.NODULE)

    assert (x > 0) == (label.side is Side.LEFT)
    assert z == pytest.approx(phantom.findings.nodules[0].centre_mm[2], abs=phantom.slice_mm)


def test_nodule_volume_is_that_of_its_diameter() -> None:
    """Partial volume adds up: the excess of HU over the lung is the ball's."""
    seed = next(s for s in range(200) if (n := build(s, COARSE).findings.nodules) and n[0].diameter_mm > 18)
    protocol = Protocol(pixels=192, slices=80)
    scene = build(seed, protocol)
    (nodule,) = scene.findings.nodules
    share = (scene.masks & Mask.NODULE) > 0
    millilitres = share.sum() * scene.grid.pixel_mm**2 * scene.grid.slice_mm / 1000

    assert millilitres == pytest.approx(np.pi / 6 * nodule.diameter_mm**3 / 1000, rel=0.3)


def test_effusion_lies_at_the_back_and_is_fluid() -> None:
    """Fluid gathers behind, in the pleural cavity of its side."""
    phantom = first_with(lambda f: len(f.effusions) == 1)
    mask = (phantom.masks & Mask.EFFUSION) > 0
    x, y, _ = centre_of(phantom, Mask.EFFUSION)

    assert y > 0
    assert (x > 0) == (phantom.findings.effusions[0].side is Side.LEFT)
    assert -20 < np.median(phantom.values[mask]) < 45


def test_pneumothorax_is_air_in_front() -> None:
    """Air without vessels, in front of the lung."""
    phantom = first_with(lambda f: f.pneumothorax)
    mask = (phantom.masks & Mask.PNEUMOTHORAX) > 0

    assert np.median(phantom.values[mask]) < -900
    assert centre_of(phantom, Mask.PNEUMOTHORAX)[1] < 0


def test_consolidation_is_dense_and_in_its_zone() -> None:
    """No air in it; its height gives its zone."""
    phantom = first_with(lambda f: f.consolidations)
    (consolidation,) = phantom.findings.consolidations
    mask = (phantom.masks & Mask.CONSOLIDATION) > 0

    assert np.median(phantom.values[mask]) > -200
    assert phantom.labels.consolidation is not None
    assert phantom.labels.consolidation.zone is consolidation.zone


def test_no_nodule_hides_in_another_finding() -> None:
    """A label that nobody could see would be wrong."""
    for seed in range(40):
        phantom = generate(seed, COARSE)
        nodule = (phantom.masks & Mask.NODULE) > 0
        other = (phantom.masks & (Mask.EFFUSION | Mask.CONSOLIDATION | Mask.PNEUMOTHORAX)) > 0

        assert not (nodule & other).any()


def test_zone_is_unsaid_at_its_border() -> None:
    """Two readers would disagree there."""
    assert zone_of(1 / 3) is None
    assert zone_of(0.2) is Zone.LOWER
    assert zone_of(0.9) is Zone.UPPER


@pytest.mark.parametrize("body", list(Body))
@pytest.mark.parametrize("modality", list(Modality))
def test_only_chest_ct_is_supported(body: Body, modality: Modality) -> None:
    """Every other body and modality is labelled so, and is not empty."""
    phantom = generate(1, Protocol(pixels=60, slices=8), body=body, modality=modality)

    assert phantom.labels.supported == (body is Body.CHEST and modality is Modality.CT)
    assert phantom.values.std() > 20


def test_thinner_slices_are_noisier() -> None:
    """Noise falls with the volume of a voxel."""
    spread = {}
    for slices in (10, 160):
        phantom = generate(2, Protocol(pixels=64, slices=slices))
        air = phantom.values[(phantom.masks & Mask.BODY) == 0]
        spread[slices] = np.std(air[(air > -1020) & (air < -985)])

    assert spread[160] > spread[10]


def test_mixed_phantoms_hold_both_kinds() -> None:
    """Held-out phantoms are mostly chest CT, with others among them."""
    supported = [generate_mixed(seed, Protocol(pixels=24, slices=6)).labels.supported for seed in range(60)]

    assert 0.6 < np.mean(supported) < 1


def test_slabs_are_what_the_model_sees() -> None:
    """The protocol of training has two slices of 120 pixels for each of 24 slabs."""
    phantom = generate(3, SLABS)
    slabs = as_slabs(phantom)

    assert phantom.values.shape == (48, 120, 120)
    assert slabs.values.shape == slabs.masks.shape == (24, 120, 120)
    assert slabs.z_mm == pytest.approx(phantom.z_mm.reshape(24, 2).mean(axis=1), abs=1e-3)
    assert slabs.slice_mm == pytest.approx(2 * phantom.slice_mm)
    assert np.abs(slabs.values - phantom.values.reshape(24, 2, 120, 120).mean(axis=1)).max() <= 0.5
    assert (slabs.masks == phantom.masks[::2] | phantom.masks[1::2]).all()
