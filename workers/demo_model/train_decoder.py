"""Second stage of training: the language model learns to write the report from the tower's tokens, and to answer.

Readings pruned hard by the product's own pruners first, then as in use; on request still shorter ones before, of some
thirty tokens that the tower's own heads find suspicious. The tower stands still.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.demo_model.accuracy import Accuracy, accuracy_of
from workers.demo_model.carry_over import carry_over
from workers.demo_model.dialogue import Row, Writer, draw_questions, padded, run_rows, text_loss
from workers.demo_model.encode import (
    Encoded,
    Seen,
    Shown,
    draw_setting,
    encode,
    see,
    show_pruned,
    show_suspects,
)
from workers.demo_model.folder import new_model, tokenizer
from workers.demo_model.makers import made
from workers.demo_model.optimise import Optimisers, Schedule, agreed, average_gradients, knows_half
from workers.demo_model.pool import Example, Mixture, examples
from workers.demo_model.report_text import read
from workers.demo_model.sharpen import sharpen
from workers.demo_model.slab_signs import SlabHeads, slab_signs
from workers.demo_model.train_vision import Eyes, eyes_of, held_out_examples
from workers.demo_model.words import IMAGE_TOKENS, SPACE

PROMPTS = (
    "You are a radiology assistant. Read the slices of this examination in order and write a report "
    "with the sections Findings: and Impression:.",
    "Describe this CT study.",
)
MIXTURE = Mixture(nodules=1, plaques_share=0, fresh=1, size=60)
TEXT_TOKENS = 330  # prompt, report and questions without visual tokens, about


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """short: share of the training with short readings. It ends at `steps` or after `minutes`, whichever is sooner."""

    seed: int = 0
    steps: int = 1600
    minutes: float = float("inf")
    short: float = 0.0
    sharpen: int = 300  # studies to fit the projection to before a new training; 0: leave it, as short readings need
    carry: int = 0  # instead: studies by which a new tower is made to speak as that of `start` did
    reports: int = 16  # per step and process at most
    aspects: int = 3  # asked about after each report at most, besides whether each finding is there
    tokens: int = 3600  # of all readings of a step and process together
    fresh: int = 1  # studies encoded before each step, per process
    kept: int = 3000  # encoded studies in memory per process
    first: int = 1500
    noise: float = 0.2  # added to each feature, as a share of its spread: stands for another scan of the same study
    signs: float = 0.5  # weight of what is asked inside, at the end of each slab
    rate: float = 1.5e-3
    decay_from: float = 0.45
    held_out: int = 24  # studies to watch the training by
    watch: int = 400  # steps between looks at them


@torch.no_grad()
def write_reports(
    model: Gemma3ForConditionalGeneration, writer: Writer, shown: Sequence[Shown], together: int = 8
) -> list[str]:
    """Greedy reports through the stock generate, several at a time."""
    texts: list[str] = []
    for first in range(0, len(shown), together):
        some = shown[first : first + together]
        rows = [writer.prompt(one, PROMPTS[0]) for one in some]
        ids = padded(rows, 0).to(model.device)
        features = torch.cat([one.features[one.kept] for one in some]).to(model.device)
        result = model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=padded([[1] * len(row) for row in rows], 0).to(model.device),
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


def load_eyes(folder: Path, plan: DecoderPlan, start: Path | None) -> Eyes:
    """From the first stage's checkpoint, or tower and projector alone from a model folder."""
    eyes, checkpoint = Eyes(plan.seed), folder / "vision.pt"
    if checkpoint.exists():
        eyes.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["eyes"])
        return eyes.eval()
    if start is None:
        raise SystemExit(f"{checkpoint} is missing: train vision first, or give --start a model folder")
    if plan.short > 0:
        raise SystemExit(f"short readings need the heads in {checkpoint}, which is missing: give --short 0")
    eyes.take_over(start)
    return eyes.eval()


def model_with(eyes: Eyes, seed: int, start: Path | None = None) -> Gemma3ForConditionalGeneration:
    """A new language model behind the trained tower and projector, which are fixed; `start`: see train_decoder."""
    model = new_model(seed)
    if start is not None:
        take_over(model, start)
    see_with(model, eyes)
    return model


def see_with(model: Gemma3ForConditionalGeneration, eyes: Eyes) -> None:
    """Give the model this tower and projector, and hold them still."""
    model.model.vision_tower.load_state_dict(eyes.tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(eyes.projector.state_dict())
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)


@torch.no_grad()
def take_over(model: Gemma3ForConditionalGeneration, folder: Path) -> None:
    """The language model of a model folder, whose words may be others: rows of the embedding go by their word."""
    old = Gemma3ForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    states = old.model.language_model.state_dict()
    embedding: Any = model.get_input_embeddings()
    before, after = states.pop("embed_tokens.weight"), embedding.weight
    for word, number in tokenizer().get_vocab().items():
        source = words.get(word, words.get(SPACE + word))
        if source is not None:
            after[number] = before[source]
    model.model.language_model.load_state_dict(states, strict=False)


def train_decoder(
    folder: Path,
    plan: DecoderPlan,
    *,
    start: Path | None = None,
    rank: int = 0,
    processes: int = 1,
    device: str = "cpu",
    makers: int = 0,
    say: Any = print,
) -> None:
    """Train to the end of the plan, going on from the checkpoint in `folder` when there is one.

    start: a model folder whose language model a new training begins with. makers: see train_vision.
    """
    if plan.short > 0 and (plan.sharpen > 0 or plan.carry > 0):
        raise SystemExit("short readings go by the tower's heads, which do not fit a changed projection: --sharpen 0")
    checkpoint = folder / "decoder.pt"
    state = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.exists() else None
    eyes = load_eyes(folder, plan, start)
    eyes.to(device)
    if state is None and plan.carry:
        _carry(eyes, plan, start, makers)
    elif state is None and plan.sharpen:
        fresh = examples(plan.seed + 2, 0, 0, 1, MIXTURE)
        sharpen(eyes, [study for _ in range(plan.sharpen) for study in next(fresh)], plan.seed)
    model, writer = model_with(eyes, plan.seed, start if state is None else None), Writer(tokenizer())
    torch.nn.Module.to(model, device)  # what transformers declares of it is narrower
    heads, half = SlabHeads().to(device), knows_half(device)
    optimisers, heads_alone = Optimisers(model, plan.rate), torch.optim.AdamW(heads.parameters(), lr=2 * plan.rate)
    begin, seconds = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        eyes.tower.load_state_dict(model.model.vision_tower.state_dict())
        eyes.projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        optimisers.load_state_dict(state["optimisers"])
        heads.load_state_dict(state["heads"])
        begin, seconds = state["step"], state["cpu_seconds"]
    schedule = Schedule(plan.steps, plan.decay_from, plan.minutes * 60)
    studies = made(partial(scans, plan, rank, begin), makers)
    random = np.random.default_rng((plan.seed, rank, begin, 2))
    cache: list[Encoded] = []
    while len(cache) < plan.first:
        cache += [encode(eyes, study) for study in next(studies)]
    held_out = [encode(eyes, see(study)) for study in held_out_examples(plan.held_out)] if rank == 0 else []
    begun, wall, losses = time.process_time(), time.monotonic(), []
    for step in range(begin, plan.steps):
        elapsed = agreed(time.monotonic() - wall, processes)
        over = schedule.share(step, elapsed)
        cache += [encode(eyes, study) for study in next(studies)]
        del cache[: max(0, len(cache) - plan.kept)]
        short = over < plan.short
        chosen = random.permutation(len(cache))[: plan.reports]
        some = [cache[index] for index in chosen]
        rows, shown = _readings(writer, some, plan, over, random)
        run = run_rows(model, writer, rows, shown, half=half)
        ends = run.ids == writer.number(IMAGE_TOKENS["eoi_token"])
        signs = [slab_signs(one.targets, one.labels) for one in some[: len(rows)]]
        loss = text_loss(model, run, rows)
        whole_loss = loss + plan.signs * heads.loss(run.early[ends], run.hidden[ends], signs, shown)
        whole_loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model, processes)
        average_gradients(heads, processes)
        heads_alone.step()
        heads_alone.zero_grad(set_to_none=True)
        optimisers.step(schedule.factor(step, elapsed))
        losses.append(float(loss.detach()))
        done = step + 1
        if rank == 0 and done % 25 == 0:
            spent = seconds + time.process_time() - begun
            times = f"cpu {spent:.0f} s wall {time.monotonic() - wall:.0f} s"
            say(f"decoder step {done} loss {np.mean(losses[-25:]):.4f} {times}")
        if rank == 0 and (done % 25 == 0 or done == plan.steps or over >= 1):
            state = {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "optimisers": optimisers.state_dict(),
                "step": done,
                "cpu_seconds": seconds + time.process_time() - begun,
                "plan": asdict(plan),
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if rank == 0 and (done % plan.watch == 0 or done == plan.steps or over >= 1):
            model.eval()  # type: ignore[no-untyped-call]
            reader = (lambda one: show_suspects(one, np.random.default_rng(0))) if short else whole
            texts = write_reports(model, writer, [reader(one) for one in held_out])
            model.train()
            pairs = [(one.labels, read(text)) for one, text in zip(held_out, texts, strict=True)]
            say("held out " + json.dumps(summary(accuracy_of(pairs))))
        if over >= 1:
            break


def scans(plan: DecoderPlan, rank: int, begin: int, maker: int, makers: int) -> Iterator[list[Seen]]:
    """What one maker of a process makes, `plan.fresh` at a time, without end."""
    for chosen in examples(plan.seed + 1, rank * makers + maker, begin // makers, plan.fresh, MIXTURE):
        yield [see(one) for one in chosen]


def _carry(eyes: Eyes, plan: DecoderPlan, start: Path | None, makers: int) -> None:
    if start is None:
        raise SystemExit("--carry goes on from older weights: give --start a model folder")
    old = eyes_of(start).to(eyes.token_head.weight.device)
    fresh = made(partial(_examples_to_carry, plan), makers)
    carry_over(eyes, old, [study for _ in range(plan.carry) for study in next(fresh)], plan.seed)


def _examples_to_carry(plan: DecoderPlan, maker: int, makers: int) -> Iterator[list[Example]]:
    return examples(plan.seed + 2, maker, 0, 1, Mixture(nodules=4, size=60))


def _readings(
    writer: Writer, studies: Sequence[Encoded], plan: DecoderPlan, over: float, random: np.random.Generator
) -> tuple[list[Row], list[Shown]]:
    """Readings of one step: of one pruning setting, and as many as fit into plan.tokens."""
    setting = draw_setting(random, over)
    rows: list[Row] = []
    readings: list[Shown] = []
    room = plan.tokens
    for study in studies:
        noisy = _with_noise(study, plan.noise, random)
        shown = show_suspects(noisy, random) if over < plan.short else show_pruned(noisy, setting, random)
        room -= int(shown.kept.sum()) + TEXT_TOKENS
        if rows and room < 0:
            break
        asked = draw_questions(study.labels, study.places, shown, random, plan.aspects)
        prompt = writer.prompt(shown, PROMPTS[int(random.random() < 0.15)])
        rows.append(writer.row(prompt, study.labels, asked))
        readings.append(shown)
    return rows, readings


def _with_noise(study: Encoded, share: float, random: np.random.Generator) -> Encoded:
    noise = torch.from_numpy(random.standard_normal(study.features.shape, np.float32))
    features = study.features.float()
    return replace(study, features=features + share * features.flatten(0, 1).std(dim=0) * noise)


def summary(accuracy: Accuracy) -> dict[str, str]:
    """A line for the log."""
    found = {
        name: f"{d.f1:.2f} ({d.sensitivity.value:.2f}/{d.precision.value:.2f})"
        for name, d in accuracy.detections.items()
    }
    found |= {name: f"{rate.value:.2f}" for name, rate in accuracy.agreements.items()}
    return found | {"diameter error": f"{accuracy.median_diameter_error_mm:.1f} mm"}
