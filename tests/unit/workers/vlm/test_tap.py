"""workers.vlm.tap: the watched attention function computes what the plain one does, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from workers.vlm.tap import tapped, watching

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["sdpa", "eager"])
def towers(request: pytest.FixtureRequest) -> tuple[SiglipVisionModel, SiglipVisionModel]:
    """The same tower twice: plain, and with the tap."""
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    plain = SiglipVisionModel._from_config(config, attn_implementation=request.param).eval()
    watched = SiglipVisionModel._from_config(config, attn_implementation=request.param).eval()
    watched.load_state_dict(plain.state_dict())
    watched.set_attn_implementation(tapped(request.param))
    return plain, watched


def output(tower: SiglipVisionModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = tower(pixel_values=PIXELS).last_hidden_state
    return result


def test_output_is_the_plain_ones(towers: tuple[SiglipVisionModel, SiglipVisionModel]) -> None:
    """Watched or not, every bit of the output is that of the plain function."""
    plain, watched = towers
    layer = watched.encoder.layers[-1].self_attn

    with watching(layer, lambda *shown: None):
        seen = output(watched)

    assert torch.equal(seen, output(plain))
    assert torch.equal(output(watched), output(plain))


def test_only_the_watched_layer_is_shown(towers: tuple[SiglipVisionModel, SiglipVisionModel]) -> None:
    """One call per pass, with queries and keys of all slices."""
    _, watched = towers
    shown: list[tuple[torch.Size, float]] = []

    with watching(
        watched.encoder.layers[-1].self_attn, lambda queries, keys, scale: shown.append((queries.shape, scale))
    ):
        output(watched)

    assert shown == [(torch.Size([3, 2, 16, 8]), 8**-0.5)]


def test_nobody_watches_after_an_exception(towers: tuple[SiglipVisionModel, SiglipVisionModel]) -> None:
    """A watcher that fails is gone with its block."""
    _, watched = towers
    calls = []

    def fail(*shown: object) -> None:
        calls.append(shown)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"), watching(watched.encoder.layers[-1].self_attn, fail):
        output(watched)
    output(watched)

    assert len(calls) == 1


def test_another_thread_is_not_watched(towers: tuple[SiglipVisionModel, SiglipVisionModel]) -> None:
    """What one thread watches does not show it the slices of another."""
    _, watched = towers
    calls = []

    with watching(watched.encoder.layers[-1].self_attn, lambda *shown: calls.append(shown)):
        other = threading.Thread(target=output, args=(watched,))
        other.start()
        other.join()

    assert calls == []
