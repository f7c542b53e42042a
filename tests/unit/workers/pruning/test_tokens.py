"""workers.pruning.tokens: which tokens are kept and what the rest becomes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.pruning.finite import NotFinite
from workers.pruning.tokens import (
    Reduced,
    contextual_count,
    contextual_targets,
    dominant_tokens,
    keep_every_token,
    reduce_tokens,
)

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31 - 1))
TAUS = st.floats(0.001, 1.0)
FRACTIONS = st.floats(0.0, 0.9)


def scene(slices: int, tokens: int, seed: int, *, sharp: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that average 1, keys and features."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.softmax(torch.randn(slices, tokens, generator=generator) * sharp, dim=-1) * tokens
    return (
        scores,
        torch.randn(slices, tokens, 5, generator=generator),
        torch.randn(slices, tokens, 7, generator=generator),
    )


def reduce(received: Tensor, keys: Tensor, features: Tensor, tau: float = 0.7, fraction: float = 0.1) -> Reduced:
    return reduce_tokens(received, keys, features, tau=tau, temperature=2.0, contextual_fraction=fraction)


@given(SIZES, TAUS)
def test_dominant_tokens_hold_tau_and_no_fewer_would(size: tuple[int, int, int], tau: float) -> None:
    """The dominant tokens hold tau of the mass; without the weakest of them they would not."""
    received, _, _ = scene(*size)
    shares = torch.softmax(received.double() / 2, dim=-1)

    dominant = dominant_tokens(received, tau=tau, temperature=2.0)

    held = (shares * dominant).sum(dim=-1)
    weakest = torch.where(dominant, shares, torch.inf).min(dim=-1).values
    assert (held >= tau - 1e-12).all()
    if tau < 1:
        assert (held - weakest < tau + 1e-12).all()
    assert (torch.where(dominant, 0.0, shares).max(dim=-1).values <= weakest).all()


@given(SIZES, FRACTIONS)
def test_tau_1_is_the_identity(size: tuple[int, int, int], fraction: float) -> None:
    """At tau 1 every token is kept, bit for bit, however the attention is spread."""
    received, keys, features = scene(*size, sharp=30.0)

    reduced = reduce(received, keys, features, tau=1.0, fraction=fraction)

    assert reduced.kept.all()
    assert torch.equal(reduced.features, features)
    assert (reduced.merged_into == -1).all()


@given(SIZES, TAUS, FRACTIONS)
@settings(max_examples=60)
def test_every_token_is_accounted_for(size: tuple[int, int, int], tau: float, fraction: float) -> None:
    """A token is kept, or merged into a kept one of its slice; with no targets, dropped."""
    received, keys, features = scene(*size)

    reduced = reduce(received, keys, features, tau=tau, fraction=fraction)

    merged = reduced.merged_into >= 0
    assert not (merged & reduced.kept).any()
    assert reduced.kept.gather(1, reduced.merged_into.clamp(min=0))[merged].all()
    if fraction > 0:
        assert (merged | reduced.kept).all()
    else:
        assert not merged.any()


@given(SIZES, TAUS)
@settings(max_examples=60)
def test_merging_is_a_mean(size: tuple[int, int, int], tau: float) -> None:
    """A target becomes the mean of itself and its tokens; every other kept token stays bit for bit."""
    received, keys, features = scene(*size)

    reduced = reduce(received, keys, features, tau=tau)

    for image in range(len(features)):
        for token in reduced.kept[image].nonzero().flatten().tolist():
            members = [token, *(reduced.merged_into[image] == token).nonzero().flatten().tolist()]
            if len(members) == 1:
                assert torch.equal(reduced.features[image, token], features[image, token])
            else:
                expected = features[image, members].mean(dim=0)
                torch.testing.assert_close(reduced.features[image, token], expected)


@given(SIZES, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_slices_do_not_see_each_other(size: tuple[int, int, int], random: object) -> None:
    """Slices in another order give the same result in that order."""
    received, keys, features = scene(*size)
    order = list(range(size[0]))
    random.shuffle(order)  # type: ignore[attr-defined]

    straight = reduce(received, keys, features)
    shuffled = reduce(received[order], keys[order], features[order])

    assert torch.equal(shuffled.kept, straight.kept[order])
    assert torch.equal(shuffled.merged_into, straight.merged_into[order])
    torch.testing.assert_close(shuffled.features, straight.features[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    """Features leave in the dtype they came in, unmerged ones with the same bits."""
    received, keys, features = scene(2, 30, 1)
    features = features.to(dtype)

    reduced = reduce(received, keys.to(dtype), features, tau=0.3)

    places = torch.arange(30).expand(2, 30)
    is_target = (reduced.merged_into.unsqueeze(1) == places.unsqueeze(2)).any(dim=-1)
    untouched = reduced.kept & ~is_target
    assert reduced.features.dtype == dtype
    assert torch.equal(reduced.features[untouched], features[untouched])


def test_equal_scores_keep_the_first_tokens() -> None:
    """Ties at the cut are broken by place, so that every device keeps the same tokens."""
    dominant = dominant_tokens(torch.ones(1, 8), tau=0.5, temperature=1.0)

    assert dominant.tolist() == [[True] * 4 + [False] * 4]


def test_single_token_slice_keeps_it() -> None:
    """A slice of one token keeps it at any tau."""
    reduced = reduce(torch.ones(1, 1), torch.ones(1, 1, 2), torch.ones(1, 1, 3), tau=0.01)

    assert reduced.kept.all()


def test_constant_slice_merges_into_itself() -> None:
    """Where all tokens are alike, what is merged is what was there, and no rounding keeps one token more."""
    reduced = reduce(torch.ones(1, 20), torch.ones(1, 20, 4), torch.full((1, 20, 3), 0.5), tau=0.5)

    assert torch.equal(reduced.features, torch.full((1, 20, 3), 0.5))
    assert int(reduced.kept.sum()) == 12


def test_zero_keys_have_a_nearest_target() -> None:
    """A key of length 0 has no direction; its token still goes to a target of its slice."""
    received, _, features = scene(1, 20, 3)

    reduced = reduce(received, torch.zeros(1, 20, 4), features, tau=0.3)

    assert ((reduced.merged_into >= 0) | reduced.kept).all()


@pytest.mark.parametrize("which", ["attention received", "keys", "features"])
def test_values_that_are_no_numbers_are_refused(which: str) -> None:
    """NaN sorts first and would make one token stand for its whole slice, so it is refused by name."""
    parts = dict(zip(("attention received", "keys", "features"), scene(2, 10, 0), strict=True))
    parts[which].view(-1)[7] = float("nan")

    with pytest.raises(NotFinite, match=which):
        reduce(*parts.values())


@pytest.mark.parametrize(
    ("tokens", "fraction", "expected"),
    [(256, 0.05, 12), (42, 0.05, 2), (6, 0.05, 1), (100, 0.05, 5), (100, 0.0, 0)],
)
def test_contextual_count_rounds_down_to_at_least_one(tokens: int, fraction: float, expected: int) -> None:
    """A fraction above zero gives at least one target, zero gives none."""
    assert contextual_count(tokens, fraction) == expected


def test_targets_lie_at_an_even_stride() -> None:
    """Of 10 tokens that are left over, 3 targets are those of rank 0, 3 and 6."""
    dominant = torch.zeros(1, 12, dtype=torch.bool)
    dominant[0, [1, 5]] = True

    targets = contextual_targets(dominant, 3)

    assert targets.nonzero()[:, 1].tolist() == [0, 4, 8]


def test_identity_scores_nothing() -> None:
    """With the stage off every token is kept and no score is claimed."""
    reduced = keep_every_token(torch.ones(2, 3, 4))

    assert reduced.kept.all()
    assert reduced.scores.isnan().all()
