"""What the language model is taught on: the prompt, the report after it, and closed questions, each alone after that.

All questions about a study share one row. Their masks part them: a question sees the prompt and the report, never
another question, just as it is asked in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from service.shared.messages import Aspect, FindingName
from workers.demo_model.encode import Places, Shown
from workers.demo_model.labels import Labels
from workers.demo_model.report_text import write
from workers.demo_model.words import IMAGE_TOKENS
from workers.questions import NODULE_DIAMETERS_MM, Question, questions_about

ANSWER_WEIGHT = 2.0  # of an answer's token beside one of the report, most of which say nothing of the study
IGNORED = -100
CODED_FINDINGS = tuple(FindingName)


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one study with its branches. branch: 0 for prompt and report, then 1, 2, ...; weight: of the loss of
    each token, 0 where it is given; position: for the rotary embedding, a branch going on where the report ends.
    """

    ids: list[int]
    branch: list[int]
    weight: list[float]
    position: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Writer:
    """Prompts as the product's host builds them from the chat template."""

    words: PreTrainedTokenizerFast

    def number(self, token: str) -> int:
        return int(self.words.get_vocab()[token])

    def ids(self, text: str) -> list[int]:
        return list(self.words(text, add_special_tokens=False)["input_ids"])

    def prompt(self, shown: Shown, question: str) -> list[int]:
        """Each kept slab's name and its kept tokens in turn, then the question."""
        image = self.number(IMAGE_TOKENS["image_token"])
        result = self.ids("<bos><start_of_turn>user\n")
        for index, kept in enumerate(shown.kept.sum(dim=1).tolist(), 1):
            if kept:
                begin = self.ids(f"SLICE {index}:{IMAGE_TOKENS['boi_token']}")
                result += [*begin, *[image] * kept, self.number(IMAGE_TOKENS["eoi_token"])]
        return [*result, *self.ids(f"{question}<end_of_turn>\n<start_of_turn>model\n")]

    def answer(self, labels: Labels) -> list[int]:
        return self.ids(f"{write(labels)}<end_of_turn>")

    def row(self, prompt: list[int], labels: Labels, asked: Sequence[tuple[Question, str]]) -> Row:
        answer = self.answer(labels)
        ids, branch = [*prompt, *answer], [0] * (len(prompt) + len(answer))
        weight = [0.0] * len(prompt) + [1.0] * len(answer)
        position = list(range(len(ids)))
        begin = len(ids)
        for number, (question, said) in enumerate(asked, 1):
            given = self.ids(f"\n<start_of_turn>user\n{question.text}<end_of_turn>\n<start_of_turn>model\n")
            right = self.ids(f"{said}<end_of_turn>")
            ids += [*given, *right]
            branch += [number] * (len(given) + len(right))
            weight += [0.0] * len(given) + [ANSWER_WEIGHT] * len(right)
            position += range(begin, begin + len(given) + len(right))
        return Row(ids, branch, weight, position)


def true_answer(question: Question, labels: Labels, places: Places) -> str | None:
    """What the labels answer; None where nothing can: the finding is absent, or the study no chest CT."""
    if question.finding is None:
        return "yes" if labels.supported else "no"
    if not labels.supported:
        return None
    present: dict[FindingName, object] = {
        FindingName.NODULE: labels.nodules,
        FindingName.EFFUSION: labels.effusion,
        FindingName.CONSOLIDATION: labels.consolidation,
        FindingName.PNEUMOTHORAX: labels.pneumothorax,
        FindingName.CARDIOMEGALY: labels.cardiomegaly,
        FindingName.CALCIFICATION: labels.calcification,
    }
    if question.aspect is Aspect.PRESENCE:
        return "yes" if present[question.finding] else "no"
    if not present[question.finding]:
        return None
    answer = _attribute(question, labels, places)
    return answer if answer in question.answers else None


def _attribute(question: Question, labels: Labels, places: Places) -> str | None:
    if question.finding is FindingName.EFFUSION and labels.effusion:
        return "both" if len(labels.effusion.sides) == 2 else labels.effusion.sides[0].value
    if question.finding is FindingName.PNEUMOTHORAX and labels.pneumothorax:
        return labels.pneumothorax.side.value
    nodule = labels.nodules[0] if labels.nodules else None
    of = nodule if question.finding is FindingName.NODULE else labels.consolidation
    slab = places.nodule if question.finding is FindingName.NODULE else places.consolidation
    match question.aspect:
        case Aspect.SIDE if of:
            return of.side.value
        case Aspect.ZONE if of:
            return of.zone.value
        case Aspect.SLICE if slab:
            return str(slab)
        case Aspect.DIAMETER_MM if nodule:
            return str(min(max(nodule.diameter_mm, NODULE_DIAMETERS_MM[0]), NODULE_DIAMETERS_MM[-1]))
    return None


def draw_questions(
    labels: Labels, places: Places, shown: Shown, random: np.random.Generator, most: int
) -> list[tuple[Question, str]]:
    """Some questions with their true answers; those about what is there come first."""
    numbers = [index for index, kept in enumerate(shown.kept.any(dim=1).tolist(), 1) if kept]
    known = [
        (question, answer)
        for question in questions_about(CODED_FINDINGS, numbers)
        if (answer := true_answer(question, labels, places)) is not None
    ]
    order = random.random(len(known)) - [1.0 * (answer != "no") for _, answer in known]
    return [known[index] for index in np.argsort(order)[:most]]


def padded(rows: Sequence[Sequence[float]], value: float, kind: torch.dtype = torch.int64) -> Tensor:
    """Rows of different length to one matrix, filled on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows], dtype=kind)


def masks(branch: Tensor, position: Tensor, image: Tensor, window: int) -> dict[str, Tensor]:
    """Which token sees which, (B, 1, L, L) bool, for both kinds of layers.

    branch: (B, L), -1 for padding. An image's tokens see each other in both directions, as in the stock model.
    """
    length = branch.shape[1]
    here, there = branch[:, :, None], branch[:, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    number = (image & ~functional.pad(image, (1, -1))).cumsum(dim=1)
    block = torch.where(image, number, 0)
    same_image = (block[:, :, None] == block[:, None, :]) & image[:, :, None]
    whole = earlier & (there >= 0) & ((there == 0) | (there == here))
    near = position[:, :, None] - position[:, None, :] < window
    itself = torch.eye(length, dtype=torch.bool)  # padding too must see something, or its softmax is no number
    return {
        "full_attention": (whole | same_image | itself)[:, None],
        "sliding_attention": (whole & near | same_image | itself)[:, None],
    }


def dialogue_loss(
    model: Gemma3ForConditionalGeneration, writer: Writer, rows: Sequence[Row], shown: Sequence[Shown]
) -> Tensor:
    """Weighted mean cross entropy of the reports' and answers' tokens."""
    ids = padded([row.ids for row in rows], 0)
    position = padded([row.position for row in rows], 0)
    weight = padded([row.weight for row in rows], 0, torch.float32)
    image = ids == writer.number(IMAGE_TOKENS["image_token"])
    embedded = model.get_input_embeddings()(ids)
    features = torch.cat([one.features[one.kept] for one in shown])
    text: Any = model.config.text_config
    hidden = model.model(
        inputs_embeds=embedded.masked_scatter(image[..., None], features),
        attention_mask=masks(padded([row.branch for row in rows], -1), position, image, text.sliding_window),
        position_ids=position,
        use_cache=False,
    ).last_hidden_state[:, :-1]
    wanted = weight[:, 1:] > 0
    loss = functional.cross_entropy(model.lm_head(hidden[wanted]).float(), ids[:, 1:][wanted], reduction="none")
    share = weight[:, 1:][wanted]
    return (loss * share).sum() / share.sum()
