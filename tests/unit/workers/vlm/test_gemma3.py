"""workers.vlm.gemma3 and host: one study through MedGemma's architecture, pruned and not."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from service.shared.messages import TOKEN_CODES, Aspect, FindingName, TokenState
from service.shared.settings import ConfigurationError, ModelSettings, PruningSettings
from workers.demo_model.random_weights import IMAGE_SIZE, TOKENS_PER_IMAGE, write
from workers.errors import Refusal, RefusalCode
from workers.pruning.finite import NotFinite
from workers.pruning.slices import keep_all
from workers.questions import Question
from workers.vlm import Generation, Reading, host
from workers.vlm.assemble import prune
from workers.vlm.decoding import greedy
from workers.vlm.encode import Prepared
from workers.vlm.folder import open_folder
from workers.vlm.gemma3 import Gemma3
from workers.vlm.prompt import DroppedSlices
from workers.vlm.stages import choose_slices, choose_tokens, is_scored

OFF = PruningSettings.model_validate({"method": "off"})
PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.5, "gamma": 0.02})
QUESTION = "What is on these slices?"
KEPT, MERGED, DROPPED, NOT_ENCODED = (TOKEN_CODES[state] for state in TokenState)


def images(count: int = 6, *, equal: tuple[int, ...] = (), seed: int = 0) -> NDArray[np.uint8]:
    """Different smooth images; those in `equal` repeat the one before."""
    x, y = np.meshgrid(np.linspace(0, 3, 60), np.linspace(0, 3, 48))
    generator = np.random.default_rng(seed)
    stack = np.zeros((count, 48, 60, 3))
    for index in range(count):
        a, b, c = generator.uniform(0.5, 3, 3)
        stack[index] = (np.sin(a * x + b * y + c)[..., None] + 1) * [100, 110, 120]
        if index in equal:
            stack[index] = stack[index - 1]
    return stack.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3")
    write(path, 3)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Gemma3:
    opened = open_folder(ModelSettings(device="cpu"), folder)
    assert isinstance(opened, Gemma3)
    return opened


def stock_inputs(model: Gemma3, stack: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    """What the stock processor makes of the whole prompt, names before their images as these weights want it."""
    content: list[dict[str, object]] = []
    for number, image in enumerate(stack, start=1):
        content.append({"type": "text", "text": f"SLICE {number}: "})
        content.append({"type": "image", "image": Image.fromarray(image)})
    content.append({"type": "text", "text": QUESTION})
    return dict(
        model.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    )


def same(one: Generation, other: Generation) -> bool:
    return (
        one.text == other.text
        and one.counts == other.counts
        and np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.merged_into, other.merged_into)
        and np.array_equal(one.scores, other.scores, equal_nan=True)
    )


def test_prompt_and_pixels_are_the_stock_processors(model: Gemma3) -> None:
    """Ids and pixels are those of the stock processor given the same slices and question."""
    stack = images()
    stock = stock_inputs(model, stack)

    prepared = model.prepare(stack)
    prompt = model.ask(QUESTION, prepared, keep_all(len(stack)), DroppedSlices.OMIT)

    assert torch.equal(prepared.pixels, stock["pixel_values"])
    assert torch.equal(prompt.input_ids, stock["input_ids"][0])


def test_folder_of_a_user_gets_the_prompt_of_medgemma(folder: Path, tmp_path: Path) -> None:
    """Image, then "SLICE 1", as Google's CT notebook for MedGemma 1.5 and its server write it."""
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / "medpruner.json").unlink()
    own = open_folder(ModelSettings(device="cpu"), tmp_path / "own")
    stack = images(2)
    content = [
        {"type": "image", "image": Image.fromarray(stack[0])},
        {"type": "text", "text": "SLICE 1"},
        {"type": "image", "image": Image.fromarray(stack[1])},
        {"type": "text", "text": f"SLICE 2\n{QUESTION}"},
    ]
    stock = own.template.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )

    prompt = own.ask(QUESTION, own.prepare(stack), keep_all(2), DroppedSlices.OMIT)

    assert prompt.input_ids.tolist() == list(stock["input_ids"][0])


def test_off_is_the_stock_model_bit_for_bit(model: Gemma3) -> None:
    """With pruning off, prefill and eight decode steps have the logits of the stock class."""
    stack = images()
    config = greedy(8, [], 0)
    config.output_logits = config.return_dict_in_generate = True
    prepared = model.prepare(stack)
    choice = choose_slices(prepared.pixels, OFF)

    with torch.inference_mode():
        encoded = model.encode(prepared, choice.kept, model.groups(prepared), scored=is_scored(OFF))
        asked = model.ask(QUESTION, prepared, choice, DroppedSlices.OMIT)
        pruned = prune(asked, model.placeholder, choose_tokens(encoded, OFF), encoded.deepstack)
        ours = model.model.generate(**model.arguments([pruned]), generation_config=config)
        stock = model.model.generate(**stock_inputs(model, stack), generation_config=config)

    assert torch.equal(torch.cat(ours.logits), torch.cat(stock.logits))
    assert torch.equal(ours.sequences, stock.sequences)


def test_off_shows_everything(model: Gemma3) -> None:
    """Off keeps every input and token, scores none, and says so."""
    generation = model.read(Reading(images(), QUESTION, OFF, max_new_tokens=4))

    assert generation.inputs_kept.all()
    assert (generation.tokens == KEPT).all()
    assert np.isnan(generation.scores).all()
    assert (generation.merged_into == -1).all()
    assert generation.counts.tokens_kept == generation.counts.tokens_in == 6 * TOKENS_PER_IMAGE


def test_dropped_slices_never_reach_the_tower(model: Gemma3) -> None:
    """A slice that the slice stage drops is not encoded: the tower sees the kept ones only."""
    seen: list[int] = []
    tower = model.model.model.vision_tower
    hook = tower.register_forward_hook(
        lambda module, arguments, named, output: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    try:
        generation = model.read(Reading(images(equal=(2, 4, 5)), QUESTION, PRUNED, max_new_tokens=2))
    finally:
        hook.remove()

    assert generation.inputs_kept.tolist() == [True, True, False, True, False, False]
    assert generation.represented_by.tolist() == [0, 1, 1, 3, 3, 3]
    assert (generation.tokens[~generation.inputs_kept] == NOT_ENCODED).all()
    assert sum(seen) == 3


def test_every_token_is_on_record(model: Gemma3) -> None:
    """Codes, targets, scores and counts of one pruned study agree with each other."""
    generation = model.read(Reading(images(equal=(2,)), QUESTION, PRUNED, max_new_tokens=4))

    tokens, into, counts = generation.tokens, generation.merged_into, generation.counts
    assert ((tokens == MERGED) == (into >= 0)).all()
    assert all(tokens[image, target] == KEPT for image, row in enumerate(into) for target in row if target >= 0)
    assert np.isnan(generation.scores[2]).all()
    assert generation.scores[0].mean() == pytest.approx(1, abs=1e-5)
    assert counts.tokens_kept == (tokens == KEPT).sum() < 5 * TOKENS_PER_IMAGE
    assert counts.tokens_merged == (tokens == MERGED).sum() > 0
    assert (generation.token_rows, generation.token_columns) == (7, 7)
    assert list(generation.timings_s) == ["processor", "slice_stage", "vision", "token_stage", "prefill", "decode"]
    assert generation.memory_peak_bytes > 0


def test_without_targets_tokens_are_dropped(model: Gemma3) -> None:
    """With contextual_fraction 0 nothing is merged, and the rest is on record as dropped."""
    settings = PRUNED.model_copy(update={"contextual_fraction": 0.0})

    generation = model.read(Reading(images(), QUESTION, settings, max_new_tokens=2))

    assert set(np.unique(generation.tokens)) == {KEPT, DROPPED}
    assert generation.counts.tokens_merged == 0


@pytest.mark.parametrize("stage", ["slice_stage", "token_stage"])
def test_each_stage_can_be_off_alone(model: Gemma3, stage: str) -> None:
    """A stage that is off changes nothing: all inputs, or all tokens of kept inputs, stay."""
    settings = PRUNED.model_copy(update={stage: False})

    generation = model.read(Reading(images(equal=(1,)), QUESTION, settings, max_new_tokens=2))

    if stage == "slice_stage":
        assert generation.inputs_kept.all()
        assert (generation.tokens == MERGED).any()
    else:
        assert not generation.inputs_kept.all()
        assert set(np.unique(generation.tokens)) == {KEPT, NOT_ENCODED}


def test_no_state_survives_a_request(model: Gemma3) -> None:
    """The same study gives the same answer before and after another study with other settings."""
    first = model.read(Reading(images(seed=1), QUESTION, PRUNED, max_new_tokens=8))
    model.read(Reading(images(9, seed=2), "Another question", OFF, max_new_tokens=3))
    again = model.read(Reading(images(seed=1), QUESTION, PRUNED, max_new_tokens=8))

    assert same(first, again)


def test_failed_request_leaves_the_model_as_it_was(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in the tower the next study is read as if nothing had happened."""
    before = model.read(Reading(images(), QUESTION, PRUNED, max_new_tokens=6))
    with monkeypatch.context() as patch:
        patch.setattr(model, "features", _out_of_memory)
        with pytest.raises(MemoryError):
            model.read(Reading(images(), QUESTION, PRUNED, max_new_tokens=6))

    assert same(model.read(Reading(images(), QUESTION, PRUNED, max_new_tokens=6)), before)


def _out_of_memory(*arguments: object) -> None:
    raise MemoryError


def test_two_threads_do_not_mix(model: Gemma3) -> None:
    """Two studies at a time on one model each get their own scores and text."""
    alone = [model.read(Reading(images(seed=seed), QUESTION, PRUNED, max_new_tokens=5)) for seed in (4, 5)]
    together: dict[int, Generation] = {}

    def read(place: int) -> None:
        together[place] = model.read(Reading(images(seed=place + 4), QUESTION, PRUNED, max_new_tokens=5))

    threads = [threading.Thread(target=read, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert same(together[0], alone[0])
    assert same(together[1], alone[1])


def test_batch_of_studies_equals_single_ones(model: Gemma3) -> None:
    """Studies of different length and pruning, decoded together, say what they say alone."""
    prompts = []
    with torch.inference_mode():
        for count, settings in ((3, OFF), (7, PRUNED)):
            prepared = model.prepare(images(count))
            choice = choose_slices(prepared.pixels, settings)
            encoded = model.encode(prepared, choice.kept, model.groups(prepared), scored=is_scored(settings))
            asked = model.ask(QUESTION, prepared, choice, DroppedSlices.OMIT)
            prompts.append(prune(asked, model.placeholder, choose_tokens(encoded, settings), encoded.deepstack))
        together = model.decode(prompts, [8] * len(prompts)).tokens
        alone = [model.decode([prompt], [8]).tokens[0] for prompt in prompts]

    assert [tokens.tolist() for tokens in together] == [tokens.tolist() for tokens in alone]


def test_chunks_of_slices_change_nothing(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice at a time through the tower gives the same masks and text as all at once."""
    whole = model.read(Reading(images(), QUESTION, PRUNED, max_new_tokens=6))
    monkeypatch.setattr(host, "PATCHES_AT_ONCE", 1)
    single = model.read(Reading(images(), QUESTION, PRUNED, max_new_tokens=6))

    assert single.text == whole.text
    assert np.array_equal(single.tokens, whole.tokens)
    np.testing.assert_allclose(single.scores, whole.scores, atol=1e-5)


def test_eager_attention_gives_the_same_masks(model: Gemma3, folder: Path) -> None:
    """The attention kernel is a matter of speed."""
    eager = open_folder(ModelSettings(device="cpu", attention="eager"), folder)

    ours, other = (one.read(Reading(images(), QUESTION, PRUNED, max_new_tokens=6)) for one in (model, eager))

    assert np.array_equal(ours.tokens, other.tokens)
    np.testing.assert_allclose(ours.scores, other.scores, atol=1e-4)
    assert ours.text == other.text


def test_text_ends_where_the_model_ends(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that the model ends is whole; one cut at max_new_tokens is marked as truncated."""
    cut = model.read(Reading(images(), QUESTION, OFF, max_new_tokens=6))
    third = model.processor.tokenizer(cut.text, add_special_tokens=False)["input_ids"][2]
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [third])

    whole = model.read(Reading(images(), QUESTION, OFF, max_new_tokens=6))

    assert cut.truncated
    assert cut.counts.tokens_generated == 6
    assert not whole.truncated
    assert whole.counts.tokens_generated <= 3


def test_too_many_slices_are_refused_before_the_tower(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot fit the model's context is refused with the numbers and the keys to change, and costs nothing."""
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", 200)
    monkeypatch.setattr(model, "features", _out_of_memory)  # would be reached otherwise

    with pytest.raises(Refusal, match="max_slices") as refusal:
        model.read(Reading(images(12), QUESTION, OFF, max_new_tokens=10))

    assert refusal.value.code is RefusalCode.CONTEXT_TOO_LONG
    assert "200" in refusal.value.reason


def test_pruning_that_does_not_suffice_is_refused(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pruning might have made room and did not, the prompt is refused, never cut."""
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", 300)
    settings = PRUNED.model_copy(update={"tau": 0.95})

    with pytest.raises(Refusal, match="lower") as refusal:
        model.read(Reading(images(), QUESTION, settings, max_new_tokens=10))

    assert refusal.value.code is RefusalCode.CONTEXT_TOO_LONG


def test_single_slice_is_read(model: Gemma3) -> None:
    """One input is kept and read."""
    generation = model.read(Reading(images(1), QUESTION, PRUNED, max_new_tokens=3))

    assert generation.inputs_kept.tolist() == [True]
    assert generation.counts.tokens_kept > 0


@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_slices_leave_one(model: Gemma3, value: int) -> None:
    """Constant and equal slices are represented by the first, which is read."""
    stack = np.full((4, 40, 40, 3), value, dtype=np.uint8)

    generation = model.read(Reading(stack, QUESTION, PRUNED, max_new_tokens=3))

    assert generation.inputs_kept.tolist() == [True, False, False, False]
    assert generation.represented_by.tolist() == [0, 0, 0, 0]


def test_image_token_in_the_question_is_refused(model: Gemma3) -> None:
    """A prompt that would shift the images against their places is refused with the key to change."""
    with pytest.raises(ConfigurationError, match=r"\[report\] prompt"):
        model.read(Reading(images(), "See <start_of_image> here", PRUNED, max_new_tokens=3))


@pytest.mark.parametrize("where", ["vision", "text"])
def test_weights_that_give_nan_are_noticed(folder: Path, where: str) -> None:
    """NaN features or logits end the request: greedy decoding would turn them into token 0, silently."""
    broken = open_folder(ModelSettings(device="cpu"), folder)
    part = broken.model.model.multi_modal_projector.mm_input_projection_weight
    if where == "text":
        part = broken.model.lm_head.weight
    with torch.no_grad():
        part[0, 0] = float("nan")

    with pytest.raises(NotFinite, match="visual features" if where == "vision" else "logits"):
        broken.read(Reading(images(), QUESTION, OFF, max_new_tokens=3))


def test_dropped_slices_can_be_referred_to(model: Gemma3) -> None:
    """With REFER the prompt says which slice stands for a dropped one."""
    prepared = model.prepare(images(equal=(2, 3)))
    choice = choose_slices(prepared.pixels, PRUNED)

    prompt = model.ask(QUESTION, prepared, choice, DroppedSlices.REFER)

    assert "SLICES 3-4 as SLICE 2" in model.processor.tokenizer.decode(prompt.input_ids)


def test_images_of_any_size_are_resized(model: Gemma3) -> None:
    """The processor brings every slice to the model's size."""
    prepared = model.prepare(np.zeros((2, 37, 91, 3), dtype=np.uint8))

    assert prepared.pixels.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["cuda", "cpu"])
def test_too_little_memory_is_tried_with_fewer_slices(
    model: Gemma3, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Where all slices at once do not fit, an eighth of them does, and the report is the same."""
    whole = model.read(Reading(images(8), QUESTION, PRUNED, max_new_tokens=6))
    features, sizes = model.features, []

    def small_memory(pixels: torch.Tensor, prepared: Prepared) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise error
        return features(pixels, prepared)

    monkeypatch.setattr(model, "features", small_memory)
    monkeypatch.setattr(host, "PATCHES_AT_ONCE", 8 * 14 * 14)
    again = model.read(Reading(images(8), QUESTION, PRUNED, max_new_tokens=6))

    assert sizes == [8, *[1] * 8]
    assert again.text == whole.text


def test_memory_that_never_suffices_ends_the_study(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller pieces are tried once, not for ever."""
    tried: list[int] = []

    def none_left(pixels: torch.Tensor, *_: object) -> None:
        tried.append(len(pixels))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "features", none_left)
    monkeypatch.setattr(host, "PATCHES_AT_ONCE", 8 * 14 * 14)

    with pytest.raises(torch.OutOfMemoryError):
        model.read(Reading(images(8), QUESTION, OFF, max_new_tokens=6))
    assert tried == [8, 1]


def test_studies_said_together_are_those_said_alone(model: Gemma3) -> None:
    """Two studies with questions and different lengths of report: text, masks and answers are their own."""
    ask = Question(FindingName.NODULE, Aspect.PRESENCE, "Is there one?", ("yes", "no"))
    alone, seen = [], []
    for count, length in ((3, 4), (7, 9)):
        values: dict[str, Any] = {"max_new_tokens": length, "questions": lambda kept: [ask]}
        alone.append(model.read(Reading(images(count), QUESTION, PRUNED, **values)))
        seen.append(model.look(Reading(images(count), QUESTION, PRUNED, **values)))

    together = model.say(seen)

    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.answers, other.answers, atol=1e-5)


def test_loop_ends_a_text_and_not_its_neighbours(model: Gemma3) -> None:
    """A study whose text runs in circles is over early and says so; the other says what it says alone."""
    alone = model.read(Reading(images(3), QUESTION, PRUNED, max_new_tokens=70))
    seen = [model.look(Reading(images(count), QUESTION, PRUNED, max_new_tokens=70)) for count in (3, 7)]
    word = model.processor.tokenizer("x", add_special_tokens=False)["input_ids"][0]

    def insist(module: object, arguments: object, logits: torch.Tensor) -> torch.Tensor:
        logits[-1, :, word] = 1e4  # the last study of the batch
        return logits

    hook = model.model.lm_head.register_forward_hook(insist)
    try:
        together = model.say(seen)
        single = model.say(seen[1:])
    finally:
        hook.remove()

    assert same(together[0], alone)
    assert together[1].text == single[0].text == "x"
    assert together[1].repetition
    assert not together[1].truncated
    assert single[0].counts.tokens_generated == 48
