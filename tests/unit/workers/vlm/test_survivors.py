"""workers.vlm.survivors: features kept for the next prompt about the same pixels, and the text they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service.shared.settings import ModelSettings, PruningSettings
from tests.tiny_models import write_qwen3_vl, write_video_llama3
from workers.demo_model.random_weights import write as write_gemma3
from workers.vlm import Generation, Reading
from workers.vlm import host as host_module
from workers.vlm.folder import open_folder
from workers.vlm.host import Host
from workers.vlm.survivors import cache_key

PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.6, "gamma": 0.02})


def images(count: int = 4, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 56, 3), dtype=np.uint8)


def _gemma3(folder: Path) -> Path:
    write_gemma3(folder, 3)
    return folder


@pytest.fixture(scope="module", params=[_gemma3, write_qwen3_vl, write_video_llama3], ids=["gemma3", "qwen3vl", "hulu"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    write: Callable[[Path], Path] = request.param
    return open_folder(ModelSettings(device="cpu"), write(tmp_path_factory.mktemp("models") / "model"))


def same(one: Generation, other: Generation) -> bool:
    parts = [field.name for field in dataclasses.fields(one) if field.name not in {"timings_s", "memory_peak_bytes"}]
    return all(np.array_equal(getattr(one, part), getattr(other, part), equal_nan=part == "scores") for part in parts)


def read(model: Host, stack: NDArray[np.uint8], cache: Path | None, prompt: str = "What?") -> Generation:
    return model.read(Reading(stack, prompt, PRUNED, max_new_tokens=6, cache=cache))


def no_tower(*_: object) -> None:
    raise AssertionError("the tower was run")


def test_second_prompt_skips_the_tower_and_says_the_same(
    model: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other words about the same pixels: masks and text are those without the folder; the timings say it was used."""
    stack = images()
    stack[2] = stack[1]
    first = read(model, stack, tmp_path)
    expected = [read(model, stack, None, prompt) for prompt in ("What?", "Why?")]
    with monkeypatch.context() as patch:
        patch.setattr(model, "features", no_tower)
        patch.setattr(model, "prepare", no_tower)
        again = [read(model, stack, tmp_path, prompt) for prompt in ("What?", "Why?")]

    assert same(first, again[0])
    assert all(same(one, other) for one, other in zip(expected, again, strict=True))
    assert "study_cache" not in first.timings_s
    assert list(again[1].timings_s) == ["study_cache", "prefill", "decode"]


def test_other_pixels_or_settings_are_no_match(model: Host, tmp_path: Path) -> None:
    """One pixel, a threshold, the weights or the device: each makes another key; the prompt's form does not."""
    stack = images()
    other = stack.copy()
    other[0, 0, 0, 0] ^= 1
    key = cache_key(stack, PRUNED, None, model.identity)

    assert key != cache_key(other, PRUNED, None, model.identity)
    assert key != cache_key(stack, PRUNED.model_copy(update={"tau": 0.61}), None, model.identity)
    for change in ({"weights_sha256": "0"}, {"device": "cuda:0"}, {"dtype": "bfloat16"}):
        assert key != cache_key(stack, PRUNED, None, model.identity.model_copy(update=change))
    assert key == cache_key(stack, PRUNED.model_copy(update={"dropped_slices": "name"}), None, model.identity)


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x" * 99])
def test_partial_file_is_not_used(model: Host, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """What a power cut left is read as nothing, and written anew."""
    first = read(model, images(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))

    second = read(model, images(), tmp_path)
    third = read(model, images(), tmp_path)

    assert same(first, second)
    assert same(first, third)
    assert "study_cache" not in second.timings_s
    assert "study_cache" in third.timings_s


def test_full_disk_costs_time_only(model: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study whose features cannot be kept is read all the same."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_module, "store", full)

    assert same(read(model, images(), tmp_path), read(model, images(), None))
