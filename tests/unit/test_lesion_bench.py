"""tests.bench.lesion_survival: a measure that is wrong would prove anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from service.shared.messages import SliceOperation
from tests.bench.lesion_survival import (
    BUDGETS,
    Methods,
    RandomTower,
    Shown,
    measure,
    survival,
    table,
    wilson,
)
from tests.bench.nodules import DIAMETERS_MM, Case, Planted, make_case
from workers.preprocess import Slab, slabs

TOWER = RandomTower()
TOKENS = TOWER.rows * TOWER.columns


@pytest.fixture(scope="module")
def case() -> Case:
    """One chest with one nodule of each size, 96 pixels wide."""
    return make_case(3, pixels=96, per_size=1)


def simple() -> tuple[Case, Planted]:
    """Twelve slices of nothing with a nodule of 100 HU on slices 4 to 6, in one token."""
    added = np.full((3, 2, 2), 100, np.float32)
    nodule = Planted(4, True, (4, 32, 32), added)
    hu = np.full((12, 64, 64), -850, np.float32)
    hu[4:7, 32:34, 32:34] += 100
    return Case(0, hu, 5.0, (nodule,)), nodule


def everything(inputs: tuple[Slab, ...], operation: SliceOperation = SliceOperation.MEAN) -> Shown:
    count = len(inputs)
    return Shown(inputs, operation, np.ones(count, bool), np.ones((count, TOKENS), bool), count * TOKENS)


def test_nodules_have_their_sizes_and_lie_apart(case: Case) -> None:
    """What was added is what the thin slices hold, and no two nodules share a voxel."""
    assert sorted(nodule.diameter_mm for nodule in case.nodules) == list(DIAMETERS_MM)
    count = np.zeros(case.hu.shape, np.int8)
    for nodule in case.nodules:
        z, y, x = nodule.first
        depth, height, width = nodule.added.shape
        count[z : z + depth, y : y + height, x : x + width] += nodule.added != 0
        assert abs(depth * 1.25 - nodule.diameter_mm) <= 2 * 1.25 + 1.25
    assert count.max() == 1


def test_everything_shown_means_every_nodule_survives(case: Case) -> None:
    """All thin slices with all tokens are the upper bound."""
    whole = everything(tuple(Slab(index, index + 1) for index in range(len(case.hu))))

    assert all(survival(case, nodule, whole, TOWER) == (True, True, True) for nodule in case.nodules)


def test_mean_dilutes_what_the_maximum_keeps() -> None:
    """A nodule on 3 of 12 slices has a quarter of its contrast in their mean, all of it in their maximum."""
    case, nodule = simple()
    one = (Slab(0, 12),)

    assert survival(case, nodule, everything(one), TOWER) == (True, False, False)
    assert survival(case, nodule, everything(one, SliceOperation.MIP), TOWER) == (True, True, True)
    assert survival(case, nodule, everything(slabs(12, 1.25, 4.0, 85)), TOWER) == (True, True, True)


def test_token_beside_the_nodule_does_not_count() -> None:
    """All tokens but its own: seen by the tower, not by the language model."""
    case, nodule = simple()
    result = everything((Slab(3, 6), Slab(6, 9)))
    result.own[:, 8 * 16 + 8] = False

    assert survival(case, nodule, result, TOWER) == (False, True, False)


def test_slice_that_was_not_encoded_does_not_count() -> None:
    """Neither its tokens nor its contrast."""
    case, nodule = simple()
    result = everything((Slab(3, 6), Slab(6, 9)))
    result.encoded[:] = False

    assert survival(case, nodule, result, TOWER) == (False, False, False)


@pytest.mark.parametrize("budget", BUDGETS)
def test_methods_meet_the_budget(case: Case, budget: float) -> None:
    """Tokens that are compared are the same number, or fewer for ours."""
    methods = Methods(case, TOWER)

    assert methods.guarded(budget).tokens_kept <= budget * methods.tokens_thin
    assert methods.uniform(budget).tokens_kept == pytest.approx(budget * methods.tokens_thin, rel=0.1)
    assert methods.slabs_alone(budget).tokens_kept == pytest.approx(budget * methods.tokens_thin, rel=0.1)


def test_records_become_a_table(case: Case, tmp_path: Path) -> None:
    """Every size has its nodules, and what is kept as JSON reads back the same."""
    records = measure(case, TOWER, ["guarded", "uniform"], (0.1,))

    lines = list(table(json.loads(json.dumps(records))))

    assert len(lines) == 4
    assert lines[2].startswith("| guarded |")
    assert lines[2].count("1 **1.000**") + lines[2].count("**0.000**") == len(DIAMETERS_MM)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (190, 200, 0.9104, 0.9726)]
)
def test_wilson_interval(hits: int, trials: int, low: float, high: float) -> None:
    """Values of the closed form, computed by hand."""
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-3)
