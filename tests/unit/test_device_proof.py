"""The proof that a device reads as the processor does: what it compares, and that it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from service.shared.settings import ConfigurationError
from tests.prove import devices
from workers.vlm import Generation


@pytest.fixture(scope="module")
def generations() -> list[Generation]:
    return devices.read([devices.study_of(seed, devices.PROTOCOL) for seed in (1000, 1001)], "cpu", "float32")


def test_the_same_reading_differs_in_nothing(generations: list[Generation]) -> None:
    found = devices.difference(generations, generations)

    assert found.none
    assert found.questions > 0
    assert (found.moved_tokens, found.scores, found.answers) == (0, 0, 0)


def test_a_token_a_text_and_a_decision_are_each_seen(generations: list[Generation]) -> None:
    """Rounding is not: scores and probabilities may differ."""
    first, *rest = generations
    tokens = first.tokens.copy()
    tokens.flat[0] = tokens.flat[0] + 1
    turned = tuple(tuple(reversed(one)) for one in first.answers)
    near = tuple(tuple(np.asarray(one) * 0.999) for one in first.answers)

    for change in ({"tokens": tokens}, {"text": first.text + "."}, {"answers": turned}):
        assert not devices.difference(generations, [replace(first, **change), *rest]).none
    assert devices.difference(generations, [replace(first, answers=near, scores=first.scores + 0.001), *rest]).none


def test_the_processor_reads_as_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """In small, on the processor: the table, and exit status 0."""
    assert devices.main(["--device", "cpu", "--studies", "1"]) == 0
    assert "| cpu, float32 | 0 | 1 of 1 | 1 of 1 |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"\[model\] device: 'cuda:99'"):
        devices.main(["--device", "cuda:99", "--studies", "1"])
