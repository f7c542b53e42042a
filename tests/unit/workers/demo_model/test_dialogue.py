"""Closed questions behind a report: what the language model is taught on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from service.shared.messages import Aspect, FindingName
from workers.demo_model.anatomy import Side, Zone
from workers.demo_model.dialogue import (
    ATTRIBUTE,
    CODED_FINDINGS,
    FIXED,
    PRESENCE,
    Row,
    Writer,
    dialogue_loss,
    draw_questions,
    masks,
    padded,
    report_weights,
    run_rows,
    text_loss,
    true_answer,
    weight_of_nodule,
)
from workers.demo_model.encode import Places, Shown, places_of
from workers.demo_model.findings import Extent, NoduleKind
from workers.demo_model.folder import new_model, tokenizer
from workers.demo_model.labels import ConsolidationLabel, EffusionLabel, Labels, NoduleLabel
from workers.demo_model.phantom import SLABS, as_slabs, generate
from workers.demo_model.words import IMAGE_TOKENS
from workers.questions import Question, questions_about

LABELS = Labels(
    nodules=(
        NoduleLabel(Side.LEFT, Zone.UPPER, NoduleKind.SOLID, 14),
        NoduleLabel(Side.RIGHT, Zone.MID, NoduleKind.SOLID, 6),
    ),
    effusion=EffusionLabel((Side.RIGHT, Side.LEFT), Extent.SMALL),
    consolidation=ConsolidationLabel(Side.RIGHT, Zone.LOWER),
    cardiomegaly=True,
)
PLACES = Places(nodule=2, consolidation=3)
EVERY_QUESTION = questions_about(CODED_FINDINGS, range(1, 25))


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(tokenizer())


def shown_of(slabs: int = 4, tokens: int = 36) -> Shown:
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand((slabs, tokens), generator=generator) < 0.3
    kept[0] = False
    return Shown(torch.randn((slabs, tokens, 128), generator=generator), kept)


def asked(finding: FindingName, aspect: Aspect) -> Question:
    return next(one for one in EVERY_QUESTION if one.finding is finding and one.aspect is aspect)


@pytest.mark.parametrize("question", EVERY_QUESTION, ids=lambda one: f"{one.finding}-{one.aspect}")
def test_every_question_and_answer_is_in_the_models_words(writer: Writer, question: Question) -> None:
    """No word is unknown, and each text comes back as it went in."""
    for text in (question.text, *question.answers):
        ids = writer.ids(text)
        assert writer.number("<unk>") not in ids
        assert writer.words.decode(ids) == text


@pytest.mark.parametrize(
    ("finding", "aspect", "answer"),
    [
        (FindingName.NODULE, Aspect.PRESENCE, "yes"),
        (FindingName.NODULE, Aspect.SIDE, "left"),
        (FindingName.NODULE, Aspect.ZONE, "upper"),
        (FindingName.NODULE, Aspect.DIAMETER_MM, "14"),
        (FindingName.NODULE, Aspect.SLICE, "2"),
        (FindingName.EFFUSION, Aspect.SIDE, "both"),
        (FindingName.CONSOLIDATION, Aspect.ZONE, "lower"),
        (FindingName.CONSOLIDATION, Aspect.SLICE, "3"),
        (FindingName.CARDIOMEGALY, Aspect.PRESENCE, "yes"),
        (FindingName.PNEUMOTHORAX, Aspect.PRESENCE, "no"),
        (FindingName.PNEUMOTHORAX, Aspect.SIDE, None),
    ],
)
def test_the_true_answer_is_what_the_labels_say(finding: FindingName, aspect: Aspect, answer: str | None) -> None:
    """Of the largest nodule; nothing is answered about what is absent."""
    assert true_answer(asked(finding, aspect), LABELS, PLACES) == answer


def test_of_what_is_no_chest_ct_only_that_is_taught() -> None:
    """Every other answer is unknown."""
    taught = {one.aspect: true_answer(one, Labels(supported=False), Places()) for one in EVERY_QUESTION}
    assert taught.pop(Aspect.CHEST_CT) == "no"
    assert not any(taught.values())
    assert true_answer(EVERY_QUESTION[0], LABELS, PLACES) == "yes"


def test_a_slab_that_is_not_shown_is_no_answer() -> None:
    """Where the slab with the finding is left out of the reading, the question is not taught."""
    question = next(one for one in questions_about([FindingName.NODULE], [1, 3]) if one.aspect is Aspect.SLICE)
    assert true_answer(question, LABELS, PLACES) is None


def test_every_finding_is_asked_about_whether_it_is_there_or_not() -> None:
    """Asked too seldom about what is absent, a model learns to say yes. Aspects are asked of what is there."""
    random = np.random.default_rng(0)
    drawn = [draw_questions(LABELS, PLACES, shown_of(), random, 3) for _ in range(50)]

    for questions in drawn:
        presence = {question.finding: answer for question, answer in questions if question.aspect is Aspect.PRESENCE}
        assert set(presence) == set(FindingName)
        assert presence[FindingName.PNEUMOTHORAX] == presence[FindingName.CALCIFICATION] == "no"
        aspects = [one for one, _ in questions if one.aspect not in (Aspect.PRESENCE, Aspect.CHEST_CT)]
        assert len(aspects) == 3
        assert not {one.finding for one in aspects} & {FindingName.PNEUMOTHORAX, FindingName.CALCIFICATION}
    whole = sum(questions[0][0].aspect is Aspect.CHEST_CT for questions in drawn)
    assert 5 < whole < 30


def test_of_another_body_it_is_always_asked_whether_it_is_a_chest() -> None:
    """That is all there is to ask."""
    drawn = draw_questions(Labels(supported=False), Places(), shown_of(), np.random.default_rng(0), 3)
    assert [(question.aspect, answer) for question, answer in drawn] == [(Aspect.CHEST_CT, "no")]


def test_words_that_tell_studies_apart_weigh_more(writer: Writer) -> None:
    """Whether there is a nodule most; what every report has in common hardly anything."""
    words = writer.words.convert_ids_to_tokens(writer.answer(LABELS))
    weights = list(zip(words, report_weights(words, LABELS), strict=True))
    impression = words.index("Impression")

    assert weights[2] == ("▁Left", max(report_weights(words, LABELS)))
    assert {weight for word, weight in weights if word in ("▁zone", "▁mm", ".", "▁lung")} == {FIXED}
    assert {weight for word, weight in weights[:impression] if word in ("▁Bilateral", "▁No", "▁is")} == {PRESENCE}
    assert {weight for word, weight in weights[:impression] if word in ("▁14", "▁upper", "▁solid")} == {ATTRIBUTE}
    assert max(weight for _, weight in weights[impression:]) < ATTRIBUTE


def test_the_decoded_sentence_of_another_body_has_no_nodule_to_weigh(writer: Writer) -> None:
    """Its first word is not about nodules."""
    other = Labels(supported=False)
    words = writer.words.convert_ids_to_tokens(writer.answer(other))
    assert max(report_weights(words, other)) == PRESENCE


def test_a_nodule_below_what_is_claimed_weighs_less_and_none_more() -> None:
    """What cannot be seen teaches guessing; half of the chests in training have a nodule, fewer of those in use."""
    tiny, claimed = (
        weight_of_nodule(replace(LABELS, nodules=(replace(LABELS.nodules[0], diameter_mm=diameter_mm),)))
        for diameter_mm in (6, 8)
    )
    assert tiny < claimed < weight_of_nodule(Labels())


def test_places_are_the_slabs_that_hold_the_findings() -> None:
    """The slab of the largest nodule's centre, counted from 1, head first."""
    phantom = as_slabs(next(one for seed in range(40) if (one := generate(seed, SLABS)).findings.nodules))
    place = places_of(phantom).nodule
    assert place is not None
    centre = max(phantom.findings.nodules, key=lambda nodule: nodule.diameter_mm).centre_mm[2]
    assert abs(phantom.z_mm[place - 1] - centre) <= phantom.slice_mm / 2 + 1e-3


def test_each_question_is_taught_as_if_it_were_alone(writer: Writer) -> None:
    """The loss over one packed row is that of the stock model run on report and questions one by one."""
    model, shown = new_model(0).eval(), shown_of()
    prompt = writer.prompt(shown, "Describe this CT study.")
    questions = [(asked(*key), answer) for key, answer in QUESTIONS.items()]
    with torch.no_grad():
        packed = float(dialogue_loss(model, writer, [writer.row(prompt, LABELS, questions)], [shown]))
        sums, weights = 0.0, 0.0
        for part in (None, *questions):
            row = writer.row(prompt, LABELS, [part] if part else [])
            if part:  # the report was counted already
                row = replace(row, weight=[w if b else 0.0 for w, b in zip(row.weight, row.branch, strict=True)])
            loss, weight = stock_loss(model, writer, row, shown)
            sums, weights = sums + loss, weights + weight
    assert packed == pytest.approx(sums / weights, rel=1e-4)


def test_rows_of_different_length_are_padded_without_a_trace(writer: Writer) -> None:
    """Two studies in one batch lose what each loses alone."""
    model, some = new_model(0).eval(), [shown_of(4), shown_of(7)]
    rows = [writer.row(writer.prompt(one, "Describe this CT study."), LABELS, []) for one in some]
    with torch.no_grad():
        together = float(dialogue_loss(model, writer, rows, some))
        alone = [float(dialogue_loss(model, writer, [row], [one])) for row, one in zip(rows, some, strict=True)]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_half_precision_gives_nearly_the_same_loss_and_gradients(writer: Writer) -> None:
    """And the model is left as it was: it goes on generating with its usual attention."""
    torch.set_num_threads(1)
    model, some = new_model(3), [shown_of(3), shown_of(5)]
    rows = [writer.row(writer.prompt(one, "Describe this CT study."), LABELS, []) for one in some]
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    usual = model.model.language_model.config._attn_implementation
    losses, gradients = [], []
    for half in (False, True):
        loss = text_loss(model, run_rows(model, writer, rows, some, half=half), rows)
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten())

    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert model.model.language_model.config._attn_implementation == usual


def test_distant_tokens_are_seen_by_full_layers_only() -> None:
    """The sliding layers see a window of positions, as in the stock model."""
    branch, position = torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)[None]
    both = masks(branch, position, torch.zeros(1, 6, dtype=torch.bool), window=3)
    assert both["full_attention"][0, 0, 5].tolist() == [True] * 6
    assert both["sliding_attention"][0, 0, 5].tolist() == [False, False, False, True, True, True]


QUESTIONS = {
    (FindingName.NODULE, Aspect.SIDE): "left",
    (FindingName.NODULE, Aspect.DIAMETER_MM): "14",
    (FindingName.PNEUMOTHORAX, Aspect.PRESENCE): "no",
}


def stock_loss(model: object, writer: Writer, row: Row, shown: Shown) -> tuple[float, float]:
    """Weighted sum of the losses, and of the weights, through the stock forward with its own masks."""
    ids = torch.tensor([row.ids])
    image = ids == writer.number(IMAGE_TOKENS["image_token"])
    embedded = model.get_input_embeddings()(ids).masked_scatter(image[..., None], shown.features[shown.kept])  # type: ignore[attr-defined]
    logits = model(  # type: ignore[operator]
        inputs_embeds=embedded, attention_mask=torch.ones_like(ids), token_type_ids=image.long(), use_cache=False
    ).logits[0, :-1]
    weight = padded([row.weight], 0, torch.float32)[0, 1:]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return float((losses * weight).sum()), float(weight.sum())
