"""workers.vlm.decoding: when a text is over, alone and beside others."""

from __future__ import annotations

import pytest
import torch

from workers.vlm.decoding import LEAST, LONGEST, LOOKED_FOR_EVERY, ROUNDS, Ending, Over, end_of, loop_in

END = 1
BEFORE = [7, 8, 9, 5]


def words(count: int) -> list[int]:
    """Text that never repeats itself."""
    return list(range(100, 100 + count))


@pytest.mark.parametrize("period", [1, 2, 12, 13, LONGEST])
def test_loop_is_found_with_its_first_word(period: int) -> None:
    """However long a round is; one word before the required length it is none yet."""
    needed = max(ROUNDS * period, LEAST)
    looping = words(10) + (words(period + 10)[10:] * needed)[:needed]

    assert loop_in(looping) == (10, period)
    assert loop_in(looping[:-1]) is None


@pytest.mark.parametrize("text", [[], words(5), words(400), words(30) * 3, words(LONGEST + 1) * 5])
def test_what_is_said_three_times_or_at_length_is_no_loop(text: list[int]) -> None:
    """Both lungs may be described in the same words."""
    assert loop_in(text) is None


def test_loop_that_the_text_left_again_is_none() -> None:
    """The text goes on with something else; what to make of it is for whoever reads the words."""
    assert loop_in([5] * 60 + words(3)) is None


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([*words(4), END, 0, 0], 7, (5, 5, Ending.OWN)),
        ([*words(4), END], 4, (4, 4, Ending.LENGTH)),
        (words(4), 4, (4, 4, Ending.LENGTH)),
        ([*words(9), *[5] * 55, 0, 0], 64, (10, 64, Ending.REPETITION)),
        ([*[5] * 55, END], 64, (56, 56, Ending.OWN)),
    ],
)
def test_end_says_what_counts_and_why(tokens: list[int], limit: int, expected: tuple[int, int, Ending]) -> None:
    """The model's own end before everything else; of a loop its first round; padding never."""
    assert end_of(tokens, limit, [END]) == expected


def test_each_text_of_a_batch_ends_by_itself() -> None:
    """At its limit, or in its loop; a text that has ended and is padded since is in no loop."""
    length = 5 * LOOKED_FOR_EVERY
    rows = [[6] * length, words(length), [*words(3), END, *[0] * (length - 4)], words(length)]
    over = Over(len(BEFORE), [200, length, 200, 200], [END])

    ends = over(torch.tensor([BEFORE + row for row in rows]), None)

    assert ends.tolist() == [True, True, False, False]
    assert over.lengths == [length, length, 200, 200]


def test_loop_stays_over_once_padding_follows_it() -> None:
    """Its length is that at which it was found."""
    over = Over(0, [400], [END])
    over(torch.tensor([[6] * 64]), None)
    padded = [[6] * 64 + [0] * 64]

    assert over(torch.tensor(padded), None).tolist() == [True]
    assert end_of(padded[0], over.lengths[0], [END]) == (1, 64, Ending.REPETITION)
