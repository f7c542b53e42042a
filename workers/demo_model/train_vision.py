"""First stage of training: the vision tower and the projector learn what each patch shows.

Linear heads on the patches and on the projected tokens are thrown away afterwards. On a machine without GPU several
processes share the work, each makes its own phantoms and gradients are averaged; a GPU is fed by makers beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import Gemma3ForConditionalGeneration, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from workers.demo_model.architecture import config, start_vision, vision_config
from workers.demo_model.makers import made
from workers.demo_model.optimise import Optimisers, Schedule, agreed, average_gradients, knows_half
from workers.demo_model.phantom import SLABS, build, draw_kind
from workers.demo_model.pool import Example, Mixture, examples, expose, member_of, moved
from workers.demo_model.targets import SIGNS, Sign
from workers.demo_model.widen import widened
from workers.demo_model.words import IMAGE_TOKENS, vocabulary

SIGN_WEIGHTS = {
    Sign.NODULE: 16.0,
    Sign.SOLID: 4.0,
    Sign.CONSOLIDATION: 3.0,
    Sign.CALCIFICATION: 10.0,
    Sign.ENLARGED: 2.0,
    Sign.SUPPORTED: 0.5,
    Sign.RIGHT: 0.3,
    Sign.LEFT: 0.3,
    Sign.UPPER: 0.5,
    Sign.MID: 0.5,
    Sign.LOWER: 0.5,
}
POSITIVE_WEIGHTS = {Sign.NODULE: 3.0, Sign.CALCIFICATION: 3.0}
# Of a nodule up to this diameter in mm:
SIZE_WEIGHTS = ((6.0, 0.2), (8.0, 0.7), (12.0, 2.0), (20.0, 1.2), (float("inf"), 1.4))
SMALLEST_MEASURED_MM = 7  # the diameter of smaller ones is not asked
PATCH_SHARE = 0.3  # of the loss on patches, beside that on the tokens, which are what the language model gets
SLABS_AT_ONCE = 24  # on a CPU
SLAB_SHARE = 3.0  # of the loss on a slab's likeliest true and likeliest false place for a nodule

Dense = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]  # a study's part of Targets
# Slabs of several studies: images (N, P, P, 3) uint8, then Targets of the patches and of the tokens, float16.
Batch = list[Tensor]


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """How long and how hard. The schedule ends at `steps` or after `minutes`, whichever is sooner; the rate falls
    linearly to zero over its last part.
    """

    seed: int = 0
    steps: int = 4000
    minutes: float = float("inf")
    studies: int = 8  # per step and process
    slabs: int = 16  # of each study
    moved: int = 0  # how often each scan is shown besides, its field of view somewhere else
    rate: float = 2e-3
    decay_from: float = 0.3
    heads: int = 30  # first steps in which only the heads learn, where tower and projector come from older weights
    held_out: int = 80  # studies to watch the training by
    watch: int = 400  # steps between looks at them


class Eyes(nn.Module):
    """Tower, projector and the two heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower = SiglipVisionModel(vision_config())
        self.projector = Gemma3MultiModalProjector(config(vocabulary(), IMAGE_TOKENS))
        start_vision(self.tower, self.projector, torch.Generator().manual_seed(seed))
        width, text_width = self.projector.mm_input_projection_weight.shape
        self.patch_head = nn.Linear(width, SIGNS + 1)
        self.token_head = nn.Linear(text_width, SIGNS + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (N, 3, P, P) in -1..1 to logits per patch (N, n, SIGNS + 1) and per token (N, k, SIGNS + 1)."""
        patches = self.tower(pixels).last_hidden_state
        return self.patch_head(patches), self.token_head(self.projector(patches))

    def in_half(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, computed in bfloat16 on weights that stay float32: 1.7 times as fast where the processor knows it.

        Not by autocast, whose conversions eat the gain; nor on a CPU with the fused attention, slow backwards there,
        nor with so many slabs at once that what is between two layers leaves the processor's cache.
        """
        on_cpu = pixels.device.type == "cpu"
        if on_cpu:
            self.tower.set_attn_implementation("eager")
        half = {name: weight.bfloat16() for name, weight in self.named_parameters()}
        some = torch.split(pixels.bfloat16(), SLABS_AT_ONCE if on_cpu else len(pixels))
        on_patches, on_tokens = zip(*(functional_call(self, half, (slabs,)) for slabs in some), strict=True)
        return torch.cat(on_patches).float(), torch.cat(on_tokens).float()

    def take_over(self, folder: Path) -> None:
        """Tower and projector of a model folder, which may be half as wide."""
        older = eyes_of(folder)
        width, before = (len(one.projector.mm_input_projection_weight) for one in (self, older))
        if width not in (before, 2 * before):
            raise SystemExit(
                f"{folder}: its tower is {before} wide; one of {width} can go on from {width} or {width // 2}"
            )
        for mine, its in ((self.tower, older.tower), (self.projector, older.projector)):
            states = its.state_dict()
            mine.load_state_dict(states if width == before else widened(states, 0))

    def pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """(S, P, P, 3) as the tower takes them, on its device."""
        return to_pixels(torch.from_numpy(images).to(self.token_head.weight.device))

    def tokens(self, pixels: Tensor) -> Tensor:
        projected: Tensor = self.projector(self.tower(pixels).last_hidden_state)
        return projected


def eyes_of(folder: Path) -> Eyes:
    """Those of a model folder, whatever their shape; its patches have no head."""
    eyes = Eyes(0)
    model = Gemma3ForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32).model
    eyes.tower, eyes.projector = model.vision_tower, model.multi_modal_projector
    return eyes.eval()


def to_pixels(images: Tensor) -> Tensor:
    """(S, P, P, 3) uint8 to (S, 3, P, P) float32 in -1..1, as the model's image processor scales them."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def dense_loss(logits: Tensor, present: Tensor, weight: Tensor, log_diameter: Tensor) -> Tensor:
    """Weighted cross entropy of all signs plus the squared error of the nodules' logarithmic diameter."""
    importance, positive = torch.ones(2, SIGNS)
    for sign, value in SIGN_WEIGHTS.items():
        importance[sign] = value
    for sign, value in POSITIVE_WEIGHTS.items():
        positive[sign] = value
    diameter = log_diameter.exp()
    by_size = weight_of_size(diameter)
    importance = weight * importance.to(weight.device)
    importance[..., Sign.NODULE] *= torch.where(present[..., Sign.NODULE] > 0, by_size, 1.0)
    entropy = functional.binary_cross_entropy_with_logits(
        logits[..., :SIGNS], present, importance, pos_weight=positive.to(weight.device), reduction="sum"
    )
    cells = present[..., 0].numel()
    known = present[..., Sign.NODULE] * (diameter >= SMALLEST_MEASURED_MM)
    size = ((logits[..., SIGNS] - (log_diameter - 2.3)) ** 2 * known).sum() / known.sum().clamp(min=1)
    return entropy / cells + 0.5 * size


def weight_of_size(diameter_mm: Tensor) -> Tensor:
    limits, shares = (torch.tensor(column, device=diameter_mm.device) for column in zip(*SIZE_WEIGHTS, strict=True))
    return shares[torch.bucketize(diameter_mm, limits[:-1], right=True)]


def slab_loss(logits: Tensor, present: Tensor, weight: Tensor, log_diameter: Tensor) -> Tensor:
    """Cross entropy of the likeliest place of a nodule in each slab, once among the true and once among the others.

    A study is judged by its likeliest token: what matters is the worst vessel, dome or rib, not the average one.
    """
    nodule, true, known = logits[..., Sign.NODULE], present[..., Sign.NODULE] > 0, weight[..., Sign.NODULE] > 0
    lowest = torch.finfo(nodule.dtype).min
    others = nodule.masked_fill(true | ~known, lowest).amax(dim=1)
    missed, place = nodule.masked_fill(~true, lowest).max(dim=1)
    shows = true.any(dim=1) * weight_of_size(log_diameter.gather(1, place[:, None])[:, 0].exp())
    some = others > lowest
    return (functional.softplus(others[some]).sum() + (shows * functional.softplus(-missed).clamp(max=50)).sum()) / len(
        nodule
    )


def batch_of(chosen: list[Example], slabs: int, random: np.random.Generator) -> Batch:
    """Some slabs of each study; those with lung, nodules or plaques are rather taken."""
    images: list[NDArray[np.uint8]] = []
    patches: list[Dense] = []
    tokens: list[Dense] = []
    for example in chosen:
        shown = example.member.tokens.present.max(axis=1)
        worth = 0.7 * shown[:, Sign.LUNG] + 0.6 * shown[:, Sign.NODULE] + 0.3 * shown[:, Sign.CALCIFICATION]
        order = np.argsort(-random.random(len(worth)) - worth)[:slabs]
        images.append(example.images[order])
        for store, targets in ((patches, example.member.patches), (tokens, example.member.tokens)):
            store.append((targets.present[order], targets.weight[order], targets.log_diameter[order]))
    dense = [np.concatenate(parts) for store in (patches, tokens) for parts in zip(*store, strict=True)]
    return [torch.from_numpy(np.concatenate(images)), *(torch.from_numpy(one).half() for one in dense)]


def batches(plan: VisionPlan, rank: int, first: int, maker: int, makers: int) -> Iterator[Batch]:
    """What one maker of a process makes, without end."""
    number, begin = rank * makers + maker, first // makers
    random = np.random.default_rng((plan.seed, number, begin, 1))
    for chosen in examples(plan.seed, number, begin, plan.studies, Mixture()):
        again = [moved(one, random) for one in chosen for _ in range(plan.moved)]
        yield batch_of(chosen + again, plan.slabs, random)


def train_vision(
    folder: Path,
    plan: VisionPlan,
    *,
    start: Path | None = None,
    rank: int = 0,
    processes: int = 1,
    device: str = "cpu",
    makers: int = 0,
    say: Any = print,
) -> None:
    """Train to the end of the plan, going on from the checkpoint in `folder` when there is one.

    start: a model folder whose tower and projector a new training begins with. makers: processes that make studies for
    this one; 0: it makes them itself.
    """
    eyes = Eyes(plan.seed)
    checkpoint = folder / "vision.pt"
    first, seconds = 0, 0.0
    if start is not None and not checkpoint.exists():
        eyes.take_over(start)
    eyes.to(device)
    heads_alone, half = plan.heads if start is not None else 0, knows_half(device)
    optimisers = Optimisers(eyes, plan.rate)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        eyes.load_state_dict(state["eyes"])
        optimisers.load_state_dict(state["optimisers"])
        first, seconds = state["step"], state["cpu_seconds"]
    schedule = Schedule(plan.steps, plan.decay_from, plan.minutes * 60)
    fresh = made(partial(batches, plan, rank, first), makers)
    held_out = held_out_examples(plan.held_out) if rank == 0 else []
    begun, wall, losses = time.process_time(), time.monotonic(), []
    for step in range(first, plan.steps):
        elapsed = agreed(time.monotonic() - wall, processes)
        over = schedule.share(step, elapsed)
        images, *dense = (part.to(device) for part in next(fresh))
        patches, tokens = [part.float() for part in dense[:3]], [part.float() for part in dense[3:]]
        pixels = to_pixels(images)
        on_patches, on_tokens = eyes.in_half(pixels) if half else eyes(pixels)
        loss = PATCH_SHARE * dense_loss(on_patches, *patches) + dense_loss(on_tokens, *tokens)
        loss = loss + SLAB_SHARE * (PATCH_SHARE * slab_loss(on_patches, *patches) + slab_loss(on_tokens, *tokens))
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(eyes, processes)
        for weight in eyes.tower.parameters() if step < heads_alone else ():
            weight.grad = None
        optimisers.step(schedule.factor(step, elapsed))
        losses.append(float(loss.detach()))
        done = step + 1
        if rank == 0 and done % 25 == 0:
            spent = seconds + time.process_time() - begun
            times = f"cpu {spent:.0f} s wall {time.monotonic() - wall:.0f} s"
            say(f"vision step {done} loss {np.mean(losses[-25:]):.4f} {times}")
        if rank == 0 and (done % 50 == 0 or done == plan.steps or over >= 1):
            state = {
                "eyes": eyes.state_dict(),
                "optimisers": optimisers.state_dict(),
                "step": done,
                "cpu_seconds": seconds + time.process_time() - begun,
                "plan": asdict(plan),
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if rank == 0 and (done % plan.watch == 0 or done == plan.steps or over >= 1):
            say("held out " + json.dumps(study_scores(eyes, held_out)))
        if over >= 1:
            break


def held_out_examples(count: int, first_seed: int = 500_000_000) -> list[Example]:
    """Ordinary studies that training never sees; for watching the training, not for the figures that are published."""
    found = []
    for seed in range(first_seed, first_seed + count):
        random = np.random.default_rng((seed, 11))
        body, modality = draw_kind(random, 0.12)
        found.append(expose(member_of(build(seed, SLABS, body=body, modality=modality)), random))
    return found


@torch.no_grad()
def study_scores(eyes: Eyes, held_out: list[Example]) -> dict[str, float]:
    """Area under the ROC curve per finding, each study scored by its highest token."""
    rows = []
    for example in held_out:
        on_patches, on_tokens = (one.cpu() for one in eyes(eyes.pixels(example.images)))
        rows.append(torch.cat([on_patches[..., :SIGNS].amax((0, 1)), on_tokens[..., :SIGNS].amax((0, 1))]).numpy())
    scores = np.stack(rows)
    truths = [example.labels for example in held_out]
    chest = np.asarray([truth.supported for truth in truths])
    sizes = np.asarray([max((n.diameter_mm for n in truth.nodules), default=0) for truth in truths])
    none = chest & (sizes == 0)
    result = {}
    for name, least, most in (("4-8", 4, 8), ("8-12", 8, 12), ("12-20", 12, 20), ("20-31", 20, 31), (">=8", 8, 99)):
        some = chest & (sizes >= least) & (sizes < most)
        result[f"nodule {name}"] = _area(scores[some, Sign.NODULE], scores[none, Sign.NODULE])
        if name == ">=8":
            result["token nodule >=8"] = _area(scores[some, SIGNS + Sign.NODULE], scores[none, SIGNS + Sign.NODULE])
            result["best f1 >=8"] = _best_f1(scores[some, Sign.NODULE], scores[none, Sign.NODULE])
    for sign, present in (
        (Sign.EFFUSION, [truth.effusion is not None for truth in truths]),
        (Sign.CONSOLIDATION, [truth.consolidation is not None for truth in truths]),
        (Sign.PNEUMOTHORAX, [truth.pneumothorax is not None for truth in truths]),
        (Sign.CALCIFICATION, [truth.calcification for truth in truths]),
        (Sign.ENLARGED, [truth.cardiomegaly for truth in truths]),
    ):
        yes = np.asarray(present)
        result[sign.name.lower()] = _area(scores[chest & yes, SIGNS + sign], scores[chest & ~yes, SIGNS + sign])
    supported = scores[:, SIGNS + Sign.SUPPORTED]
    result["supported"] = _area(supported[chest], supported[~chest])
    return {name: round(float(value), 3) for name, value in result.items()}


def _area(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> float:
    return float((positive[:, None] > negative[None, :]).mean()) if positive.size and negative.size else float("nan")


def _best_f1(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> float:
    """With its threshold chosen on the same studies: optimistic."""
    scores = (
        float(2 * (positive >= cut).sum() / ((positive >= cut).sum() + (negative >= cut).sum() + len(positive)))
        for cut in positive
    )
    return max(scores, default=float("nan"))
