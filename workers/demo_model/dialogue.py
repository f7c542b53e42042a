"""What the language model is taught on: the prompt, the report after it, and closed questions, each alone after that.

All questions about a study share one row. Their masks part them: a question sees the prompt and the report, never
another question, just as it is asked in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import Gemma3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from service.shared.messages import Aspect, FindingName
from workers.demo_model.accuracy import SMALLEST_CLAIMED_MM
from workers.demo_model.encode import Places, Shown
from workers.demo_model.labels import Labels
from workers.demo_model.report_text import write
from workers.demo_model.words import IMAGE_TOKENS, SPACE
from workers.questions import NODULE_DIAMETERS_MM, Question, questions_about

# Weights of the loss of a token. Most of a report's hundred say nothing of the study; those at which reports of
# different studies part are worth more, and whether there is a nodule is the hardest to see.
FIXED, ATTRIBUTE, PRESENCE, NODULE_PRESENCE = 0.15, 1.5, 3.0, 8.0
UNCLAIMED = 0.5  # times those of a nodule below what is claimed: what cannot be seen teaches guessing
NO_NODULE = 1.3  # times those of a study without: half of the chests in training have one
REPEATED = 0.6  # what the impression says again
ANSWER, NODULE_ANSWER, END_OF_ANSWER = 1.5, 3.0, 0.1
PARTING_WORDS = frozenset(
    {
        "No",
        "Right",
        "Left",
        "Bilateral",
        "Heart",
        "Aortic",
        "Body",
        "right",
        "left",
        "bilateral",
        "upper",
        "mid",
        "lower",
    }
    | {"solid", "ground", "small", "moderate", "large", "is", "size"}
)
CHEST_CT_SHARE = 0.3  # of the chest CTs that are asked whether they are one
CODED_FINDINGS = tuple(FindingName)
FLOAT_ATTENTION = "float32"  # our name for it in transformers
WATCHED_LAYER = 1  # the first that sees every slab; two more can still read what it gathered


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
        return list(_ids(self.words, text))

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
        weight = [0.0] * len(prompt) + report_weights(self.words.convert_ids_to_tokens(answer), labels)
        position = list(range(len(ids)))
        begin = len(ids)
        for number, (question, said) in enumerate(asked, 1):
            given = self.ids(f"\n<start_of_turn>user\n{question.text}<end_of_turn>\n<start_of_turn>model\n")
            right = self.ids(f"{said}<end_of_turn>")
            ids += [*given, *right]
            branch += [number] * (len(given) + len(right))
            nodule = question.finding is FindingName.NODULE and question.aspect is Aspect.PRESENCE
            first = NODULE_ANSWER * weight_of_nodule(labels) if nodule else ANSWER
            weight += [0.0] * len(given) + [first] + [END_OF_ANSWER] * (len(right) - 1)
            position += range(begin, begin + len(given) + len(right))
        return Row(ids, branch, weight, position)


@lru_cache(maxsize=4096)  # slabs' names and questions come again and again
def _ids(words: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(words(text, add_special_tokens=False)["input_ids"])


def weight_of_nodule(labels: Labels) -> float:
    """Factor for whether there is a nodule."""
    if not labels.nodules:
        return NO_NODULE
    largest = max(nodule.diameter_mm for nodule in labels.nodules)
    return 1.0 if largest >= SMALLEST_CLAIMED_MM else UNCLAIMED


def report_weights(words: Sequence[str], labels: Labels) -> list[float]:
    """Of the tokens of a report in the first phrasing. Its sentences' first words say what is there, nodules first."""
    impression = words.index("Impression")
    found, sentence = [], 0
    for index, word in enumerate(words):
        plain = word.removeprefix(SPACE)
        parting = plain in PARTING_WORDS or plain.isdigit()
        first = index > 0 and words[index - 1] in (".", ":")
        if index >= impression:
            found.append(REPEATED if parting else FIXED)
        elif first and sentence == 0 and labels.supported:
            found.append(NODULE_PRESENCE * weight_of_nodule(labels))
        elif first or plain in ("is", "size"):  # "Heart is enlarged", "Heart size is normal"
            found.append(PRESENCE)
        else:
            found.append(ATTRIBUTE if parting else FIXED)
        sentence += word == "."
    return found


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
    """Questions with their true answers: whether each finding is there, always; `most` aspects of what is there.

    Chosen by what is there, absent findings would hardly be asked about, and the model would learn to say yes.
    """
    numbers = [index for index, kept in enumerate(shown.kept.any(dim=1).tolist(), 1) if kept]
    known = [
        (question, answer)
        for question in questions_about(CODED_FINDINGS, numbers)
        if (answer := true_answer(question, labels, places)) is not None
    ]
    whole = not labels.supported or random.random() < CHEST_CT_SHARE
    study = [one for one in known if one[0].aspect is Aspect.CHEST_CT and whole]
    presence = [one for one in known if one[0].aspect is Aspect.PRESENCE]
    aspects = [one for one in known if one[0].aspect not in (Aspect.CHEST_CT, Aspect.PRESENCE)]
    return [*study, *presence, *(aspects[index] for index in random.permutation(len(aspects))[:most])]


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
    earlier = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    number = (image & ~functional.pad(image, (1, -1))).cumsum(dim=1)
    block = torch.where(image, number, 0)
    same_image = (block[:, :, None] == block[:, None, :]) & image[:, :, None]
    whole = earlier & (there >= 0) & ((there == 0) | (there == here))
    near = position[:, :, None] - position[:, None, :] < window
    # padding too must see something, or its softmax is no number
    itself = torch.eye(length, dtype=torch.bool, device=branch.device)
    return {
        "full_attention": (whole | same_image | itself)[:, None],
        "sliding_attention": (whole & near | same_image | itself)[:, None],
    }


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What came of a batch: ids (B, L), hidden states of the last layer and of the one after which slabs are watched,
    (B, L, c).
    """

    ids: Tensor
    hidden: Tensor
    early: Tensor


def run_rows(
    model: Gemma3ForConditionalGeneration,
    writer: Writer,
    rows: Sequence[Row],
    shown: Sequence[Shown],
    *,
    half: bool = False,
) -> Run:
    """Through the language model once; `half`: its layers in bfloat16, on weights that stay float32."""
    language: Any = model.model.language_model
    device = model.device
    ids = padded([row.ids for row in rows], 0).to(device)
    position = padded([row.position for row in rows], 0).to(device)
    image = ids == writer.number(IMAGE_TOKENS["image_token"])
    embedded = model.get_input_embeddings()(ids)
    features = torch.cat([one.features[one.kept] for one in shown]).to(device)
    caught: list[Any] = []
    handle = language.layers[WATCHED_LAYER].register_forward_hook(lambda module, inputs, result: caught.append(result))
    given = {
        "inputs_embeds": embedded.masked_scatter(image[..., None], features),
        "attention_mask": masks(
            padded([row.branch for row in rows], -1).to(device), position, image, language.config.sliding_window
        ),
        "position_ids": position,
        "use_cache": False,
    }
    try:
        hidden = _in_half(language, given) if half else language(**given).last_hidden_state
    finally:
        handle.remove()
    early = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return Run(ids, hidden.float(), early.float())


def _in_half(language: Any, given: dict[str, Any]) -> Tensor:
    ALL_ATTENTION_FUNCTIONS.register(FLOAT_ATTENTION, _float_attention)
    usual = language.config._attn_implementation
    language.config._attn_implementation = FLOAT_ATTENTION
    weights = {name: weight.bfloat16() for name, weight in language.named_parameters()}
    try:
        embedded = given["inputs_embeds"].bfloat16()
        result: Tensor = functional_call(language, weights, (), given | {"inputs_embeds": embedded}).last_hidden_state
    finally:
        language.config._attn_implementation = usual
    return result


def _float_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Fused attention; on a CPU in float32, because its backward is many times slower in bfloat16 there."""
    kind = torch.float32 if query.device.type == "cpu" else query.dtype
    times = query.shape[1] // key.shape[1]
    keys, values = (one.to(kind).repeat_interleave(times, dim=1) for one in (key, value))
    mixed = functional.scaled_dot_product_attention(query.to(kind), keys, values, attn_mask=mask, scale=scaling)
    return mixed.to(query.dtype).transpose(1, 2).contiguous(), None


def text_loss(model: Gemma3ForConditionalGeneration, run: Run, rows: Sequence[Row]) -> Tensor:
    """Weighted mean cross entropy of the reports' and answers' tokens."""
    weight = padded([row.weight for row in rows], 0, torch.float32)[:, 1:].to(run.ids.device)
    wanted = weight > 0
    logits = model.lm_head(run.hidden[:, :-1][wanted]).float()
    loss = functional.cross_entropy(logits, run.ids[:, 1:][wanted], reduction="none")
    return (loss * weight[wanted]).sum() / weight[wanted].sum()


def dialogue_loss(
    model: Gemma3ForConditionalGeneration, writer: Writer, rows: Sequence[Row], shown: Sequence[Shown]
) -> Tensor:
    """Of a batch of rows: what is said alone."""
    return text_loss(model, run_rows(model, writer, rows, shown), rows)
