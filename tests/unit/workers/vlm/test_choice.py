"""Closed questions after the report: probabilities of the allowed answers on all three hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.shared.messages import Aspect, FindingName
from service.shared.settings import ConfigurationError, ModelSettings, PruningSettings
from tests.tiny_models import write_qwen3_vl, write_video_llama3
from workers.demo_model.random_weights import write as write_gemma3
from workers.errors import Refusal, RefusalCode
from workers.questions import Question, questions_about
from workers.vlm import Reading
from workers.vlm import choice as choice_module
from workers.vlm.assemble import PrunedPrompt, prune
from workers.vlm.choice import can_be_shared
from workers.vlm.folder import open_folder
from workers.vlm.host import Host
from workers.vlm.prompt import DroppedSlices
from workers.vlm.stages import choose_slices, choose_tokens

PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.6, "gamma": 0.02})
OFF = PruningSettings.model_validate({"method": "off"})
ASKED = "What is there?"
# answers of one to three tokens, with a common beginning
SIDE = Question(FindingName.NODULE, Aspect.SIDE, "Which side? Answer a, ab or abc.", ("a", "ab", "abc", "z"))
SIZE = Question(FindingName.NODULE, Aspect.DIAMETER_MM, "How large in mm?", tuple(map(str, range(4, 31))))
TOLERANCE = 1e-4


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 56, 3), dtype=np.uint8)


def _gemma3(folder: Path) -> Path:
    write_gemma3(folder, 3)
    return folder


@pytest.fixture(scope="module", params=[_gemma3, write_qwen3_vl, write_video_llama3], ids=["gemma3", "qwen3vl", "hulu"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    write: Callable[[Path], Path] = request.param
    host = open_folder(ModelSettings(device="cpu"), write(tmp_path_factory.mktemp("models") / "model"))
    return host


@torch.inference_mode()
def prompted(model: Host, stack: NDArray[np.uint8], settings: PruningSettings) -> PrunedPrompt:
    prepared = model.prepare(stack)
    chosen = choose_slices(prepared.pixels, settings)
    encoded = model.encode(prepared, chosen.kept, model.groups(prepared), scored=settings is not OFF)
    asked = model.ask(ASKED, prepared, chosen, DroppedSlices.OMIT)
    return prune(asked, model.placeholder, choose_tokens(encoded, settings), encoded.deepstack)


@torch.inference_mode()
def by_full_forward(model: Host, prompt: PrunedPrompt, report: Sequence[int], question: Question) -> list[float]:
    """One forward of the whole conversation per answer, nothing shared; positions as generate() counts them."""
    sums = []
    for answer in question.answers:
        ids = model.words(answer, add_special_tokens=False)["input_ids"]
        tail = torch.tensor([*report, *model.choice_of(question).turn, *ids, model.choice_of(question).end])
        positions = prompt.positions
        if positions is not None:
            more = torch.arange(1, len(tail) + 1)[None] + positions[:, -1:]
            positions = torch.cat([positions, more], dim=1)
        whole = dataclasses.replace(prompt, input_ids=torch.cat([prompt.input_ids, tail]), positions=positions)
        logits = model.model(**model.arguments([whole])).logits[0].float()
        steps = logits.log_softmax(dim=-1)[:-1].gather(-1, whole.input_ids[1:, None])[:, 0]
        sums.append(steps[-len(ids) - 1 :].sum().double())
    return list(torch.stack(sums).softmax(dim=0).tolist())


@pytest.mark.parametrize("question", [SIDE, SIZE], ids=["side", "size"])
@pytest.mark.parametrize("settings", [OFF, PRUNED], ids=["off", "pruned"])
def test_probabilities_are_those_of_full_forwards(model: Host, settings: PruningSettings, question: Question) -> None:
    """Answers weighed from the report's own cache have the probabilities of a forward of the whole each."""
    prompt = prompted(model, images(14), settings)  # unpruned longer than Gemma's sliding window
    decoded = model.decode([prompt], [9])
    report = decoded.tokens[0]

    ours = model.answer(prompt, report, [model.choice_of(question)], decoded.cache)[0]

    ended = int(report[-1]) in model._ends()
    whole = by_full_forward(model, prompt, report[:-1].tolist() if ended else report.tolist(), question)
    assert can_be_shared(decoded.cache)
    assert sum(ours) == pytest.approx(1)
    assert max(ours) > 1.5 / len(ours)  # not flat, else nothing is tested
    np.testing.assert_allclose(ours, whole, atol=TOLERANCE)


def test_ended_report_is_followed_by_the_same_turn(model: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that ends by itself, early, is continued without a second end."""
    prompt = prompted(model, images(4), PRUNED)
    cut = model.decode([prompt], [9]).tokens[0]
    turn_end = model.choice_of(SIDE).end
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [int(cut[5]), turn_end])
    decoded = model.decode([prompt], [9])

    ours = model.answer(prompt, decoded.tokens[0], [model.choice_of(SIDE)], decoded.cache)[0]

    said = decoded.tokens[0][:-1].tolist()
    assert len(said) < 9
    np.testing.assert_allclose(ours, by_full_forward(model, prompt, said, SIDE), atol=TOLERANCE)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_without_a_cache_the_prompt_is_read_once_more(model: Host, length: int) -> None:
    """Of studies decoded together, or from a cache that is written in place, the answers are the same."""
    prompt = prompted(model, images(4), PRUNED)
    report = torch.arange(40, 40 + length)

    ours = model.answer(prompt, report, [model.choice_of(SIDE), model.choice_of(SIZE)])

    for probabilities, question in zip(ours, (SIDE, SIZE), strict=True):
        whole = by_full_forward(model, prompt, report.tolist(), question)
        np.testing.assert_allclose(probabilities, whole, atol=TOLERANCE)


def test_few_answers_at_a_time_change_nothing(model: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the number of answers weighed at a time; their probabilities stay."""
    prompt = prompted(model, images(3), PRUNED)
    decoded = model.decode([prompt], [5])
    together = model.answer(prompt, decoded.tokens[0], [model.choice_of(SIZE)], decoded.cache)
    monkeypatch.setattr(choice_module, "BYTES_AT_ONCE", 1)

    single = model.answer(prompt, decoded.tokens[0], [model.choice_of(SIZE)], decoded.cache)

    np.testing.assert_allclose(together, single, atol=TOLERANCE)


def test_each_question_stands_alone(model: Host) -> None:
    """The answers to a question do not depend on which others are asked, nor in which order."""
    settings = {"prompt": ASKED, "pruning": PRUNED, "max_new_tokens": 6}
    first = model.read(Reading(images(5), **settings, questions=lambda kept: [SIDE, SIZE]))  # type: ignore[arg-type]
    other = model.read(Reading(images(5), **settings, questions=lambda kept: [SIZE, SIDE, SIZE]))  # type: ignore[arg-type]

    assert first.answers == (other.answers[1], other.answers[0])
    assert first.questions == (SIDE, SIZE)


def test_questions_leave_nothing_behind(model: Host) -> None:
    """Text and masks are those without questions, before and after; timings name the step."""
    plain = model.read(Reading(images(5), ASKED, PRUNED, max_new_tokens=6))
    asked = model.read(Reading(images(5), ASKED, PRUNED, max_new_tokens=6, questions=lambda kept: [SIDE]))
    again = model.read(Reading(images(5), ASKED, PRUNED, max_new_tokens=6))

    assert plain.text == asked.text == again.text
    assert np.array_equal(plain.tokens, asked.tokens)
    assert list(asked.timings_s)[-1] == "questions"
    assert plain.questions == plain.answers == ()
    assert "questions" not in plain.timings_s


def test_questions_hear_which_inputs_were_kept(model: Host) -> None:
    """The numbers of the kept inputs, from 1, are what the questions about a slice are made of."""
    stack = images(5)
    stack[1] = stack[0]
    stack[4] = stack[3]
    heard: list[list[int]] = []

    def ask(kept: Sequence[int]) -> Sequence[Question]:
        heard.append(list(kept))
        return questions_about([FindingName.NODULE, FindingName.CARDIOMEGALY], kept)

    generation = model.read(Reading(stack, ASKED, PRUNED, max_new_tokens=3, questions=ask))

    assert heard == [[1, 3, 4]]
    assert [len(one) for one in generation.answers] == [len(one.answers) for one in generation.questions]
    assert [one.answers for one in generation.questions if one.aspect is Aspect.SLICE] == [("1", "3", "4")]


def test_answers_that_read_alike_are_refused(model: Host) -> None:
    """Where the tokenizer knows neither of two answers, no probability could tell them apart."""
    alike = dataclasses.replace(SIDE, answers=("é", "ü"))

    with pytest.raises(ConfigurationError, match="tell apart"):
        model.choice_of(alike)


def test_template_that_ends_no_turn_is_refused(model: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that does not mark the end of a report cannot be continued."""
    monkeypatch.setattr(
        model.template, "chat_template", "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    )

    with pytest.raises(ConfigurationError, match="chat template"):
        model.choice_of(SIDE)


def test_questions_need_room_in_the_context(model: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that fits without its questions and not with them is refused before anything is said."""
    prompt = prompted(model, images(2), OFF)
    room = len(prompt.input_ids) + 4
    monkeypatch.setattr(model.model.config.get_text_config(), "max_position_embeddings", room)
    model.read(Reading(images(2), ASKED, OFF, max_new_tokens=4))

    with pytest.raises(Refusal) as refusal:
        model.read(Reading(images(2), ASKED, OFF, max_new_tokens=4, questions=lambda kept: [SIDE]))

    assert refusal.value.code is RefusalCode.CONTEXT_TOO_LONG


def test_cache_that_is_written_in_place_is_not_shared() -> None:
    """No cache, or one of another kind, is none to continue from."""
    kinds: list[Any] = [None, Tensor()]

    assert not any(can_be_shared(kind) for kind in kinds)
