"""Every host under every method, with poor or wrong input: a right answer or a plain error, never a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.shared.messages import TOKEN_CODES, TokenState
from service.shared.settings import ModelSettings, PruningSettings
from tests.tiny_models import write_qwen3_vl, write_video_llama3
from workers.demo_model.random_weights import write as write_gemma3
from workers.errors import Refusal, RefusalCode
from workers.guide import Guide, make_guide
from workers.pruning.finite import NotFinite
from workers.regions import Spacing
from workers.vlm import Generation, Reading, encode
from workers.vlm.folder import open_folder
from workers.vlm.host import Host

KEPT, MERGED, DROPPED, NOT_ENCODED = (TOKEN_CODES[state] for state in TokenState)
METHODS = ["off", "medpruner", "guarded"]
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def _gemma3(folder: Path) -> Path:
    write_gemma3(folder, 3)
    return folder


@pytest.fixture(scope="module", params=[_gemma3, write_qwen3_vl, write_video_llama3], ids=["gemma3", "qwen3vl", "hulu"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    write: Callable[[Path], Path] = request.param
    return open_folder(ModelSettings(device="cpu"), write(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def discs(count: int) -> NDArray[np.uint8]:
    """Slices of a disc on black that grows from one to the next, with a grain."""
    y, x = np.mgrid[:48, :56]
    distance = np.hypot(y - 24, x - 28)
    grain = np.random.default_rng(0).integers(0, 40, (count, 48, 56, 3))
    grey = np.stack([np.where(distance < 10 + index, 150, 0) for index in range(count)])
    return (grey[..., None] + grain).astype(np.uint8)


def reading(images: NDArray[np.uint8], method: str, tokens: int = 3, **pruning: object) -> Reading:
    """As the pipeline would ask: `guarded` with a guide made of the same pictures."""
    settings = PruningSettings.model_validate({"method": method, "tau": 0.6, "token_budget": 0.6} | pruning)
    guide = guide_of(images) if method == "guarded" else None
    return Reading(images, "What is on these slices?", settings, tokens, guide=guide)


def guide_of(images: NDArray[np.uint8]) -> Guide:
    hu = (images[..., 0].astype(np.float32) * 8 - 1024).astype(np.float32)
    places = np.arange(len(images)) * 2.0
    return make_guide(hu, places, spacing=Spacing(2.0, 6.0, 6.0), modality="CT")


def assert_on_record(generation: Generation, images: NDArray[np.uint8]) -> None:
    """Every input is shown or has one that is; whoever is shown has a token; counts agree; scores are numbers."""
    kept, tokens = generation.inputs_kept, generation.tokens
    assert kept.any()
    assert kept[generation.represented_by].all()
    assert (generation.represented_by[kept] == np.flatnonzero(kept)).all()
    assert (tokens[~kept] == NOT_ENCODED).all()
    assert (tokens[kept] == KEPT).any(axis=1).all()
    assert generation.counts.tokens_in == len(images) * tokens.shape[1]
    assert generation.counts.tokens_kept == (tokens == KEPT).sum()
    scores = generation.scores[kept]
    assert np.isfinite(scores).all() or np.isnan(scores).all()


def test_one_slice_is_read(host: Host, method: str) -> None:
    """There is nothing to compare it with, so it is shown."""
    images = discs(1)

    generation = host.read(reading(images, method))

    assert generation.inputs_kept.tolist() == [True]
    assert_on_record(generation, images)


def test_equal_slices_are_each_shown_or_represented(host: Host, method: str) -> None:
    """`off` shows them all, the paper's rule the first, `guarded` one as often as its cap in mm asks for."""
    images = np.repeat(discs(1), 6, axis=0)

    generation = host.read(reading(images, method, gap_cap_mm=5.0))

    expected = {"off": [1, 1, 1, 1, 1, 1], "medpruner": [1, 0, 0, 0, 0, 0], "guarded": [1, 0, 1, 0, 1, 1]}
    assert generation.inputs_kept.astype(int).tolist() == expected[method]
    assert_on_record(generation, images)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_pixels_are_read(host: Host, method: str, value: int) -> None:
    """Flat attention and equal keys: no division by nothing, and something of every shown slice."""
    images = np.full((4, 48, 56, 3), value, np.uint8)

    generation = host.read(reading(images, method))

    assert_on_record(generation, images)


def test_no_slice_is_refused(host: Host, method: str) -> None:
    """By name, before anything of the model runs."""
    with pytest.raises(Refusal, match="no slice") as refusal:
        host.read(Reading(discs(1)[:0], "What?", PruningSettings.model_validate({"method": method}), 3))

    assert refusal.value.code is RefusalCode.TOO_FEW_SLICES


@pytest.mark.parametrize(
    "images",
    [discs(2).astype(np.float32) / 255, discs(2)[..., 0], discs(2)[..., :1], discs(2).astype(np.uint16)],
    ids=["float", "grey", "one channel", "16 bit"],
)
def test_pictures_of_another_kind_are_refused(host: Host, images: NDArray[Any]) -> None:
    """A processor would scale floats once more and read a row as an image, without a word."""
    with pytest.raises(ValueError, match="uint8"):
        host.read(Reading(images, "What?", PruningSettings.model_validate({"method": "off"}), 3))


def test_guide_of_another_study_is_refused(host: Host) -> None:
    """Its regions would guard the wrong tokens."""
    with pytest.raises(ValueError, match="guide knows 3 inputs, there are 4"):
        host.read(Reading(discs(4), "What?", PruningSettings(), 3, guide=guide_of(discs(3))))


def test_more_slices_than_the_context_takes_are_refused_before_the_tower(
    host: Host, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the numbers and the keys to change; nothing is cut off to make it fit."""
    images = discs(12)
    monkeypatch.setattr(host.model.config.get_text_config(), "max_position_embeddings", 40)
    monkeypatch.setattr(host, "features", None)  # would be called otherwise

    with pytest.raises(Refusal, match=r"40 .*\[series\] max_slices") as refusal:
        host.read(reading(images, method))

    assert refusal.value.code is RefusalCode.CONTEXT_TOO_LONG


def test_context_that_pruning_does_not_meet_is_refused(
    host: Host, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tokens kept need, and a report behind them, must fit; one place fewer is refused."""
    images = discs(5)
    seen = host.look(reading(images, method, tokens=4))
    needed = len(seen.prompt.input_ids) + 4
    text = host.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", needed)
    host.look(reading(images, method, tokens=4))
    monkeypatch.setattr(text, "max_position_embeddings", needed - 1)

    with pytest.raises(Refusal, match=str(needed - 4)) as refusal:
        host.look(reading(images, method, tokens=4))

    assert refusal.value.code is RefusalCode.CONTEXT_TOO_LONG


@contextmanager
def poisoned(module: torch.nn.Module, value: float) -> Iterator[None]:
    """One value of a module's output is no number."""

    def poison(_: object, __: object, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = first.clone()
        first.view(-1)[-1] = value
        return (first, *output[1:]) if isinstance(output, tuple) else first

    hook = module.register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_features_that_are_no_numbers_end_the_reading(host: Host, method: str, value: float) -> None:
    """By the name of what they are; the next study is read as if nothing had happened."""
    asked = reading(discs(4), method)
    before = host.read(asked)
    projector = next(
        module
        for name, module in host.model.named_modules()
        if name.endswith(("multi_modal_projector", "visual.merger", "model.projector"))
    )

    with poisoned(projector, value), pytest.raises(NotFinite, match="visual features"):
        host.read(asked)

    after = host.read(asked)
    assert after.text == before.text
    assert np.array_equal(after.tokens, before.tokens)


@pytest.mark.parametrize("name", ["medpruner", "guarded"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_scores_that_are_no_numbers_end_the_reading(
    host: Host, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every comparison with NaN is false, so some tokens would be chosen all the same."""
    whole = encode.received_attention

    def wrong(*tensors: torch.Tensor, **named: float) -> torch.Tensor:
        return whole(*tensors, **named).index_fill(1, torch.tensor(0), value)

    monkeypatch.setattr(encode, "received_attention", wrong)

    with pytest.raises(NotFinite, match="attention received"):
        host.read(reading(discs(4), name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_logits_that_are_no_numbers_end_the_reading(host: Host, method: str, value: float) -> None:
    """Greedy decoding would say some token, silently."""
    with poisoned(host.model.get_output_embeddings(), value), pytest.raises(NotFinite, match=r"logits .* dtype"):
        host.read(reading(discs(3), method))


def test_deepstack_features_that_are_no_numbers_end_the_reading(method: str, tmp_path: Path) -> None:
    """They enter the language model beside the others."""
    host = open_folder(ModelSettings(device="cpu"), write_qwen3_vl(tmp_path / "model"))

    with (
        poisoned(host.model.model.visual.deepstack_merger_list[0], float("nan")),
        pytest.raises(NotFinite, match="deepstack"),
    ):
        host.read(reading(discs(3), method))
