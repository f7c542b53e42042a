"""workers.pruning.attention and groups: scores of patches, and of the tokens that they become."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.pruning.attention import received_attention
from workers.pruning.groups import blocks, group_mean, runs


def tensors(slices: int, heads: int, patches: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (slices, heads, patches, width)
    return torch.randn(shape, generator=generator) * 3, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 2 * 25 * 7, 4 * 2 * 25 * 25 * 2, 2**24])
def test_chunks_add_up_to_the_whole_matrix(chunk_bytes: int) -> None:
    """One row at a time, a few, two slices or all at once: what is received is the same."""
    queries, keys = tensors(3, 2, 25, 4)
    whole = torch.softmax(queries @ keys.transpose(-1, -2) * 0.5, dim=-1).mean(dim=1).sum(dim=1)

    received = received_attention(queries, keys, scale=0.5, chunk_bytes=chunk_bytes)

    torch.testing.assert_close(received, whole)


def test_attention_received_averages_one() -> None:
    """Each query gives away exactly 1."""
    received = received_attention(*tensors(2, 3, 16, 8), scale=8**-0.5)

    torch.testing.assert_close(received.mean(dim=1), torch.ones(2))


def test_softmax_is_taken_in_float() -> None:
    """A bfloat16 layer is scored in float32: a sum of 4096 bfloat16 values would stop growing at 256."""
    queries, keys = tensors(1, 1, 600, 4)

    received = received_attention(queries.bfloat16() * 0, keys.bfloat16(), scale=1.0)

    assert received.dtype == torch.float32
    torch.testing.assert_close(received, torch.ones(1, 600))


@pytest.mark.parametrize(("rows", "columns", "side"), [(4, 4, 2), (6, 4, 2), (8, 8, 4), (3, 3, 1)])
def test_blocks_are_those_of_average_pooling(rows: int, columns: int, side: int) -> None:
    """The patches of a token are those that the projector pools into it."""
    values = torch.randn(2, rows * columns, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.avg_pool2d(values.view(2, 1, rows, columns), side).flatten(1)

    torch.testing.assert_close(group_mean(values, blocks(rows, columns, side)), pooled)


def test_runs_follow_the_order_of_the_encoder() -> None:
    """Where the processor already orders patches by block, four after each other make a token."""
    assert runs(8, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_grids_without_whole_blocks_are_refused() -> None:
    """A grid that the projector could not pool is an error, not a shifted score."""
    with pytest.raises(ValueError, match="5 x 4"):
        blocks(5, 4, 2)
    with pytest.raises(ValueError, match="runs of 4"):
        runs(6, 4)
