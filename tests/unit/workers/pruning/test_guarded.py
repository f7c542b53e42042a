"""workers.pruning.guarded: what attention would drop is kept where anatomy, contrast or distance says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.pruning.finite import NotFinite
from workers.pruning.guarded import Guards, find_sinks, keep_with_gap_cap, merge_mean, reduce_tokens
from workers.pruning.slices import SliceChoice
from workers.pruning.tokens import Reduced

ROWS, COLUMNS = 4, 5
TOKENS = ROWS * COLUMNS
SEEDS = st.integers(0, 2**31 - 1)


def guards(inputs: int, *, coverage: tuple[float, ...] = (0.0, 0.0)) -> Guards:
    """Two regions: the upper half and the lower half; all of it body, nothing salient."""
    regions = torch.zeros(inputs, TOKENS, 2, dtype=torch.bool)
    regions[:, :10, 0] = regions[:, 10:, 1] = True
    return Guards(
        regions=regions,
        body=torch.ones(inputs, TOKENS, dtype=torch.bool),
        salience=torch.zeros(inputs, TOKENS),
        coverage=torch.tensor(coverage, dtype=torch.float64),
        rows=ROWS,
        columns=COLUMNS,
        tokens_in=inputs * TOKENS,
    )


def scene(inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Attention received, keys and features."""
    generator = torch.Generator().manual_seed(seed)
    received = torch.softmax(torch.randn(inputs, TOKENS, generator=generator), dim=-1) * TOKENS
    return (
        received,
        torch.randn(inputs, TOKENS, 6, generator=generator),
        torch.randn(inputs, TOKENS, 3, generator=generator),
    )


def reduce(scene: tuple[Tensor, Tensor, Tensor], guarding: Guards, **knobs: float) -> Reduced:
    defaults = {"tau": 0.5, "sink_ratio": 10.0, "salience_floor": 100.0, "merge_similarity": 0.9}
    budget = int(knobs.pop("token_budget", 10**6))
    return reduce_tokens(*scene, guarding, token_budget=budget, **(defaults | knobs))


def choose(
    levels: list[float], places: list[float], *, cap: float = 5.0, change: float = 0.1, body: list[bool] | None = None
) -> SliceChoice:
    tiles = torch.tensor(levels).view(-1, 1, 1).expand(-1, 2, 2)
    inside = torch.tensor(body or [True] * len(levels))
    return keep_with_gap_cap(tiles, torch.tensor(places), inside, tile_change=change, gap_cap_mm=cap)


# --- slices -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=40),
    st.floats(0.5, 30.0),
    st.data(),
)
def test_gap_never_exceeds_the_cap_or_the_spacing(steps: list[float], cap: float, data: st.DataObject) -> None:
    """Whatever did or did not change, neighbours among the kept inputs are no further apart than allowed."""
    places = torch.tensor([0.0, *steps]).cumsum(0).tolist()
    levels = data.draw(st.lists(st.sampled_from([0.0, 0.05, 1.0]), min_size=len(places), max_size=len(places)))

    choice = choose(levels, places, cap=cap)

    kept = choice.kept.nonzero().flatten().tolist()
    assert kept[0] == 0
    for one, other in zip(kept, [*kept[1:], len(places) - 1], strict=True):
        assert places[other] - places[one] <= max(cap, places[min(one + 1, len(places) - 1)] - places[one]) + 1e-4
    assert all(choice.kept[anchor] for anchor in choice.anchor.tolist())


def test_change_of_one_tile_keeps_a_slice() -> None:
    """A small thing in one corner counts as much as a change everywhere."""
    tiles = torch.zeros(3, 8, 8)
    tiles[1, 7, 0] = 0.2

    choice = keep_with_gap_cap(
        tiles, torch.tensor([0.0, 1.0, 2.0]), torch.ones(3, dtype=torch.bool), tile_change=0.1, gap_cap_mm=50
    )

    assert choice.kept.tolist() == [True, True, True]


def test_equal_slices_are_kept_as_often_as_the_cap_asks() -> None:
    """Of ten equal slices 2 mm apart, one every 4 mm and the last."""
    assert choose([0.3] * 10, [2.0 * i for i in range(10)]).kept.tolist() == [
        True,
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]


def test_thick_slices_are_all_kept() -> None:
    """Where the series itself is coarser than the cap nothing is dropped."""
    assert choose([0.0] * 6, [7.0 * i for i in range(6)]).kept.all()


def test_slices_without_body_are_dropped_and_represented() -> None:
    """Air above the head and below the feet is not encoded; those before the body stand under its first slice."""
    choice = choose([0.0] * 5, [0.0, 9.0, 18.0, 27.0, 36.0], body=[False, True, True, False, False])

    assert choice.kept.tolist() == [False, True, True, False, False]
    assert choice.anchor.tolist() == [1, 1, 2, 2, 2]


def test_without_any_body_nothing_is_dropped_as_air() -> None:
    """No body found means not recognised, not empty."""
    assert choose([0.0, 1.0], [0.0, 9.0], body=[False, False]).kept.all()


def test_single_slice_is_kept() -> None:
    """A stack of one stays."""
    assert choose([0.4], [3.0]).kept.tolist() == [True]


def test_slices_that_are_no_numbers_are_refused() -> None:
    """NaN would compare as `not changed`."""
    with pytest.raises(NotFinite, match="tiles"):
        choose([0.0, float("nan")], [0.0, 1.0])


# --- tokens -----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 3 * TOKENS), st.floats(0.05, 1.0), st.floats(-1, 1))
def test_budget_holds_and_every_input_shows_something(
    seed: int, budget: int, tau: float, merge_similarity: float
) -> None:
    """Never more tokens than the budget, unless each input's one token is more; never an input without any."""
    guarding = guards(3, coverage=(1.0, 0.1))
    guarding.salience[:] = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(seed)) * 200

    reduced = reduce(scene(3, seed), guarding, token_budget=budget, tau=tau, merge_similarity=merge_similarity)

    assert int(reduced.kept.sum()) <= max(budget, 3)
    assert reduced.kept.any(dim=1).all()


@given(SEEDS, st.floats(-1, 1))
def test_merged_tokens_lie_beside_a_kept_one_that_resembles_them(seed: int, similarity: float) -> None:
    """Nothing is merged far away, into what was dropped, or below the similarity; what is kept is not merged."""
    attention, keys, features = scene(2, seed)

    reduced = reduce((attention, keys, features), guards(2), merge_similarity=similarity)

    for index, token in (reduced.merged_into >= 0).nonzero().tolist():
        target = int(reduced.merged_into[index, token])
        assert reduced.kept[index, target]
        assert not reduced.kept[index, token]
        assert max(abs(target // COLUMNS - token // COLUMNS), abs(target % COLUMNS - token % COLUMNS)) == 1
        cosine = torch.cosine_similarity(keys[index, token], keys[index, target], dim=0)
        assert cosine >= similarity - 1e-5


def test_what_resembles_nothing_is_kept_where_the_budget_allows() -> None:
    """With no neighbour above the similarity and room in the budget every token of the body survives."""
    reduced = reduce(scene(2), guards(2), merge_similarity=1.0, tau=0.2)

    assert reduced.kept.all()


def test_air_has_no_token() -> None:
    """Tokens outside the body are dropped, and merged into nothing, even at tau 1 and without a budget."""
    guarding = guards(2)
    guarding.body[:, :7] = False

    reduced = reduce(scene(2), guarding, tau=1.0)

    assert not reduced.kept[:, :7].any()
    assert (reduced.merged_into[:, :7] == -1).all()
    assert reduced.kept[:, 7:].all()


def test_salient_token_survives_without_any_attention_and_takes_nothing_in() -> None:
    """A lesion that the tower ignores is kept, as it was, on a budget of one token per input."""
    attention, keys, features = scene(2)
    attention[:, 13] = 0
    keys[:] = 1.0
    guarding = guards(2)
    guarding.salience[:, 13] = 300

    reduced = reduce((attention, keys, features), guarding, token_budget=2, merge_similarity=0.5)

    assert reduced.kept.nonzero().tolist() == [[0, 13], [1, 13]]
    assert torch.equal(reduced.features[:, 13], features[:, 13])
    assert (reduced.merged_into == -1).all()


def test_every_region_keeps_what_it_was_promised() -> None:
    """Half of a region that receives no attention at all, and one token of it on each input."""
    attention, keys, features = scene(4)
    attention[:, 10:] = 0

    reduced = reduce((attention, keys, features), guards(4, coverage=(0.0, 0.5)), token_budget=24, merge_similarity=1.0)

    assert int(reduced.kept[:, 10:].sum()) >= 20
    assert reduced.kept[:, 10:].any(dim=1).all()


def test_regions_share_the_loss_where_the_budget_cuts_their_promise() -> None:
    """Two regions of the same size and promise lose about the same."""
    reduced = reduce(scene(6), guards(6, coverage=(1.0, 1.0)), token_budget=60)

    upper, lower = int(reduced.kept[:, :10].sum()), int(reduced.kept[:, 10:].sum())
    assert upper + lower == 60
    assert abs(upper - lower) <= 6


def test_a_token_of_two_regions_counts_for_both_promises() -> None:
    """The lower region has one token on each input, as promised, and the upper one loses nothing for it."""
    guarding = guards(4, coverage=(1.0, 0.05))
    guarding.regions[:, 9, 1] = True
    guarding.salience[:, 15] = 50.0  # of the lower region alone

    reduced = reduce(scene(4), guarding, token_budget=40)

    assert reduced.kept[:, :10].all()
    assert int(reduced.kept.sum()) == 40


def test_sink_takes_nothing_from_the_others() -> None:
    """One token with nearly all of the attention is left out of tau, which the paper's rule spends on it alone."""
    attention, keys, features = scene(1)
    attention[0, 3] = 500.0

    reduced = reduce((attention, keys, features), guards(1), tau=0.9, merge_similarity=1.0, token_budget=15)

    assert find_sinks(attention, torch.ones(1, TOKENS, dtype=torch.bool), 10.0)[0].nonzero().tolist() == [[3]]
    assert not reduced.kept[0, 3]
    assert int(reduced.kept.sum()) == 15


def test_constant_attention_and_equal_keys_are_no_trouble() -> None:
    """Ties go to the first tokens; everything else is merged into its neighbours."""
    flat = torch.ones(2, TOKENS), torch.ones(2, TOKENS, 6), torch.ones(2, TOKENS, 3)

    reduced = reduce(flat, guards(2), tau=0.5)

    assert reduced.kept.sum(dim=1).tolist()[0] >= 10
    assert torch.equal(reduced.features, flat[2])
    assert torch.equal(reduced.kept[0], reduced.kept[1])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_no_numbers_are_refused(which: int) -> None:
    """By name, never as a wrong choice."""
    values = scene(2)
    values[which][1, 2] = float("nan")

    with pytest.raises(NotFinite):
        reduce(values, guards(2))


def test_merge_is_the_mean_of_the_target_and_its_tokens() -> None:
    """Counted with itself; other rows stay bit for bit."""
    features = torch.tensor([[[1.0], [4.0], [7.0], [9.0]]])

    merged = merge_mean(features, torch.tensor([[-1, 0, 0, -1]]))

    assert merged.flatten().tolist() == [4.0, 4.0, 7.0, 9.0]
