"""[model] attention = "flash_attention_2": the text of the hosts that take it, without a GPU.

flash-attn's kernels need one. Here transformers' own path to them runs (masks, unpadding, lengths of sequences), and
two functions with their signatures compute on the CPU what flash-attn documents. What its kernels do is not shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, modeling_flash_attention_utils, modeling_utils

from service.shared.messages import Aspect, FindingName
from service.shared.settings import ModelSettings, PruningSettings
from tests.tiny_models import write_hulu_med, write_qwen3_vl, write_video_llama3
from workers.questions import Question
from workers.vlm import Reading
from workers.vlm.folder import open_folder

PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.6})
OFF = PruningSettings.model_validate({"method": "off"})
ASK = Question(FindingName.NODULE, Aspect.PRESENCE, "Is there one?", ("yes", "no"))


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool) -> Tensor:
    """q (batch, queries, heads, width), k and v (batch, keys, fewer heads, width); the last query sees the last key."""
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


class Kernel:
    """Both functions, and how often each was called."""

    def __init__(self) -> None:
        self.calls = {"whole": 0, "parted": 0}

    def whole(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
    ) -> Tensor:
        self.calls["whole"] += 1
        return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)

    def parted(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Sequences one behind the other, (tokens of all, heads, width), each from one of the starts to the next."""
        self.calls["parted"] += 1
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert max(np.diff(ends_q)) <= max_seqlen_q
        assert max(np.diff(ends_k)) <= max_seqlen_k
        parts = [
            flash_attn_func(
                q[None, ends_q[n] : ends_q[n + 1]],
                k[None, ends_k[n] : ends_k[n + 1]],
                v[None, ends_k[n] : ends_k[n + 1]],
                softmax_scale=softmax_scale,
                causal=causal,
            )[0]
            for n in range(len(ends_q) - 1)
        ]
        return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """In the place of flash-attn, for transformers."""
    kernel = Kernel()
    utils = modeling_flash_attention_utils
    functions = (kernel.whole, kernel.parted, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_args, **_options: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: False)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_args, **_options: True)
    return kernel


def images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 255, (count, 48, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("write", [write_qwen3_vl, write_video_llama3, write_hulu_med])
def test_flash_attention_says_what_sdpa_says(kernel: Kernel, write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Text and answers of a pruned study and of a whole one, in float32; the text went through it."""
    folder = write(tmp_path / "model")
    plain, flash = (
        open_folder(ModelSettings(device="cpu", attention=attention), folder)
        for attention in ("sdpa", "flash_attention_2")
    )
    for settings in (PRUNED, OFF):
        reading = Reading(images(4), "What?", settings, max_new_tokens=8, questions=lambda _kept: [ASK])
        expected, said = plain.read(reading), flash.read(reading)

        assert said.text == expected.text
        assert said.text
        np.testing.assert_allclose(said.answers, expected.answers, atol=1e-4)
    assert sum(kernel.calls.values()) > 2 * 8


@pytest.mark.parametrize("write", [write_qwen3_vl, write_video_llama3])
def test_studies_of_several_lengths_are_parted(kernel: Kernel, write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Decoded together under flash attention, each says what it says alone under sdpa."""
    folder = write(tmp_path / "model")
    readings = [Reading(images(count), "What?", PRUNED, max_new_tokens=8) for count in (2, 5)]
    plain = open_folder(ModelSettings(device="cpu"), folder)
    flash = open_folder(ModelSettings(device="cpu", attention="flash_attention_2"), folder)

    together = flash.say([flash.look(reading) for reading in readings])

    assert [one.text for one in together] == [plain.read(reading).text for reading in readings]
    assert all(one.text for one in together)
    assert kernel.calls["parted"] > 0
