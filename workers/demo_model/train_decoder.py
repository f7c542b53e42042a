"""Second stage of training: the language model learns to write the report from the tower's tokens.

Short readings first (a hundred tokens), then long ones as in use, pruned at random by the product's own pruner.
The tower stands still.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Gemma3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.demo_model.accuracy import Accuracy, accuracy_of
from workers.demo_model.encode import Encoded, Shown, draw_setting, encode, show_pruned, show_suspects
from workers.demo_model.folder import new_model, tokenizer
from workers.demo_model.labels import Labels
from workers.demo_model.optimise import Optimisers, Schedule, average_gradients
from workers.demo_model.pool import Mixture, examples
from workers.demo_model.report_text import read, write
from workers.demo_model.train_vision import Eyes, held_out_examples
from workers.demo_model.words import IMAGE_TOKENS

QUESTIONS = (
    "You are a radiology assistant. Read the slices of this examination in order and write a report "
    "with the sections Findings: and Impression:.",
    "Describe this CT study.",
)
TEXT_TOKENS = 250  # prompt and report without visual tokens, about


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """short: steps with short readings, of `steps` in all."""

    seed: int = 0
    steps: int = 800
    short: int = 400
    reports: int = 16  # per step and process at most
    tokens: int = 4500  # of all readings of a step and process together
    fresh: int = 1  # studies encoded per step and process
    kept: int = 2000  # encoded studies in memory per process
    first: int = 100
    rate: float = 2e-3
    decay_from: float = 0.6
    held_out: int = 80  # studies to watch the training by


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


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different length to one matrix, filled on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def report_loss(
    model: Gemma3ForConditionalGeneration, writer: Writer, some: Sequence[tuple[Shown, Labels, str]]
) -> Tensor:
    """Mean cross entropy of the reports' tokens."""
    prompts = [writer.prompt(shown, question) for shown, _, question in some]
    answers = [writer.answer(labels) for _, labels, _ in some]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids = padded(rows, 0)
    mask = padded([[1] * len(row) for row in rows], 0)
    image = ids == writer.number(IMAGE_TOKENS["image_token"])
    embedded = model.get_input_embeddings()(ids)
    features = torch.cat([shown.features[shown.kept] for shown, _, _ in some])
    embedded = embedded.masked_scatter(image[..., None], features)
    longest = max(map(len, answers))
    hidden = model(
        inputs_embeds=embedded,
        attention_mask=mask,
        token_type_ids=image.long(),
        logits_to_keep=longest + 1,
        use_cache=False,
    ).logits[:, :-1]
    wanted = ids[:, -longest:].clone()
    for row, answer in enumerate(answers):
        wanted[row, : longest - len(answer)] = -100
    return functional.cross_entropy(hidden.flatten(0, 1).float(), wanted.flatten(), ignore_index=-100)


@torch.no_grad()
def write_reports(
    model: Gemma3ForConditionalGeneration, writer: Writer, shown: Sequence[Shown], together: int = 8
) -> list[str]:
    """Greedy reports through the stock generate, several at a time."""
    texts: list[str] = []
    for first in range(0, len(shown), together):
        some = shown[first : first + together]
        rows = [writer.prompt(one, QUESTIONS[0]) for one in some]
        ids = padded(rows, 0)
        features = torch.cat([one.features[one.kept] for one in some])
        result = model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=padded([[1] * len(row) for row in rows], 0),
            token_type_ids=(ids == writer.number(IMAGE_TOKENS["image_token"])).long(),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features[None])},
            max_new_tokens=110,
            do_sample=False,
        )
        texts += writer.words.batch_decode(result[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def whole(encoded: Encoded) -> Shown:
    """Every token."""
    return Shown(encoded.features.float(), torch.ones(encoded.features.shape[:2], dtype=torch.bool))


def load_eyes(folder: Path, seed: int) -> Eyes:
    eyes = Eyes(seed)
    eyes.load_state_dict(torch.load(folder / "vision.pt", weights_only=True)["eyes"])
    return eyes.eval()


def model_with(eyes: Eyes, seed: int) -> Gemma3ForConditionalGeneration:
    """A new language model behind the trained tower and projector, which are fixed."""
    model = new_model(seed)
    model.model.vision_tower.load_state_dict(eyes.tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(eyes.projector.state_dict())
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    return model


def train_decoder(folder: Path, plan: DecoderPlan, *, rank: int = 0, processes: int = 1, say: Any = print) -> None:
    """Train until `plan.steps`, going on from the checkpoint in `folder` when there is one."""
    eyes = load_eyes(folder, plan.seed)
    model, writer = model_with(eyes, plan.seed), Writer(tokenizer())
    optimisers = Optimisers(model, plan.rate)
    checkpoint = folder / "decoder.pt"
    begin, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        begin, seconds = state["step"], state["cpu_seconds"]
    schedule = Schedule(plan.rate, plan.steps, plan.decay_from)
    mixture = Mixture(nodules=None, fresh=1, size=60)
    studies = examples(plan.seed + 1, rank, begin, plan.fresh, mixture)
    random = np.random.default_rng((plan.seed, rank, begin, 2))
    cache: list[Encoded] = []
    while len(cache) < plan.first:
        cache += [encode(eyes, study.images, study.labels) for study in next(studies)]
    held_out = (
        [encode(eyes, study.images, study.labels) for study in held_out_examples(plan.held_out)] if rank == 0 else []
    )
    start, wall, losses = time.process_time(), time.monotonic(), []
    for step in range(begin, plan.steps):
        cache += [encode(eyes, study.images, study.labels) for study in next(studies)]
        del cache[: max(0, len(cache) - plan.kept)]
        short = step < plan.short
        chosen = random.permutation(len(cache))[: plan.reports]
        some = _readings([cache[index] for index in chosen], plan, short, random)
        loss = report_loss(model, writer, some)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model, processes)
        optimisers.step(schedule.factor(step))
        losses.append(float(loss.detach()))
        done = step + 1
        if rank == 0 and done % 25 == 0:
            spent = seconds + time.process_time() - start
            times = f"cpu {spent:.0f} s wall {time.monotonic() - wall:.0f} s"
            say(f"decoder step {done} loss {np.mean(losses[-25:]):.4f} {times}")
        if rank == 0 and (done % 50 == 0 or done == plan.steps):
            state = {
                "model": model.state_dict(),
                "optimisers": optimisers.state_dict(),
                "step": done,
                "cpu_seconds": seconds + time.process_time() - start,
                "plan": asdict(plan),
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if rank == 0 and (done % 400 == 0 or done == plan.steps):
            model.eval()  # type: ignore[no-untyped-call]
            reader = (lambda one: show_suspects(one, np.random.default_rng(0))) if short else whole
            texts = write_reports(model, writer, [reader(one) for one in held_out])
            model.train()
            pairs = [(one.labels, read(text)) for one, text in zip(held_out, texts, strict=True)]
            say("held out " + json.dumps(summary(accuracy_of(pairs))))


def _readings(
    studies: Sequence[Encoded], plan: DecoderPlan, short: bool, random: np.random.Generator
) -> list[tuple[Shown, Labels, str]]:
    """Readings of one step: of one pruning setting, and as many as fit into plan.tokens."""
    setting = draw_setting(random)
    some: list[tuple[Shown, Labels, str]] = []
    room = plan.tokens
    for study in studies:
        shown = show_suspects(study, random) if short else show_pruned(study, setting, random)
        room -= int(shown.kept.sum()) + TEXT_TOKENS
        if some and room < 0:
            break
        some.append((shown, study.labels, QUESTIONS[int(random.random() < 0.15)]))
    return some


def summary(accuracy: Accuracy) -> dict[str, str]:
    """A line for the log."""
    found = {
        name: f"{d.f1:.2f} ({d.sensitivity.value:.2f}/{d.precision.value:.2f})"
        for name, d in accuracy.detections.items()
    }
    found |= {name: f"{rate.value:.2f}" for name, rate in accuracy.agreements.items()}
    return found | {"diameter error": f"{accuracy.median_diameter_error_mm:.1f} mm"}
