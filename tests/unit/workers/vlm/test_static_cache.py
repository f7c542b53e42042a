"""[model] compile: the static cache says what the growing one says; a host that cannot be compiled says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from service.shared.messages import Aspect, FindingName
from service.shared.settings import ConfigurationError, ModelSettings, PruningSettings
from tests.tiny_models import write_qwen3_vl, write_video_llama3
from workers.demo_model.random_weights import write
from workers.questions import Question
from workers.vlm import Reading
from workers.vlm.folder import open_folder

PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.6, "gamma": 0.02})
ASK = Question(FindingName.NODULE, Aspect.PRESENCE, "Is there one?", ("yes", "no"))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3vl"])
@pytest.mark.parametrize("count", [3, 14])
def test_static_cache_says_the_same(kind: str, count: int, tmp_path: Path) -> None:
    """Text and answers in float32, also beyond a sliding window; on a CPU nothing is compiled."""
    folder = tmp_path / "model"
    write(folder, 3) if kind == "gemma3" else write_qwen3_vl(folder)
    images = np.random.default_rng(count).integers(0, 255, (count, 48, 56, 3), dtype=np.uint8)
    values = {"prompt": "What?", "pruning": PRUNED, "max_new_tokens": 8, "questions": lambda kept: [ASK]}

    plain, static = (
        open_folder(ModelSettings(device="cpu", compile=compiled), folder).read(Reading(images, **values))  # type: ignore[arg-type]
        for compiled in (False, True)
    )

    assert static.text == plain.text
    assert dataclasses.astuple(static.counts) == dataclasses.astuple(plain.counts)
    np.testing.assert_allclose(static.answers, plain.answers, atol=1e-4)


def test_architecture_that_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    """At the start, by the key to change."""
    with pytest.raises(ConfigurationError, match=r"\[model\] compile"):
        open_folder(ModelSettings(device="cpu", compile=True), write_video_llama3(tmp_path / "model"))
