"""Phantoms that no training saw, read by a model folder through the product's own host, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import process_time

import numpy as np
import torch
from numpy.typing import NDArray

from service.shared.settings import PruningSettings
from workers.demo_model.channels import SLABS as SLAB_COUNT
from workers.demo_model.encode import guide_of
from workers.demo_model.labels import Labels
from workers.demo_model.phantom import SLABS, THICK, THIN, Protocol, as_slabs, generate_mixed
from workers.demo_model.pool import TOKENS_PER_SIDE, images_of
from workers.demo_model.targets import Sign, targets_of
from workers.guide import Guide
from workers.vlm.assemble import prune
from workers.vlm.encode import Encoded, Prepared
from workers.vlm.host import Host
from workers.vlm.prompt import DroppedSlices
from workers.vlm.stages import choose_slices, choose_tokens, guards

PROTOCOLS = {
    "slabs": SLABS,  # rendered as the slabs that the model sees: quick
    "thick": THICK,  # 512 x 512, 5 mm, then averaged to slabs as a real study is
    "thick-256": Protocol(pixels=256, slice_mm=5.0),
}
HELD_OUT_SEEDS = range(0, 500_000_000)  # never trained on; see pool.TRAINING_SEEDS and train_vision.held_out_examples


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """One phantom as the worker would hand it to the model.

    thin_slices: how many slices its scan at 1.25 mm has. nodules: (S, n) bool, tokens that show one; None where the
    phantom was not rendered as slabs.
    """

    seed: int
    images: NDArray[np.uint8]
    guide: Guide
    labels: Labels
    thin_slices: int
    nodules: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What was said of one study, and what it cost. survived: was a nodule's token kept as it was? None without one."""

    seed: int
    text: str
    slices_in: int
    slices_kept: int
    tokens_in: int
    tokens_kept: int
    survived: bool | None
    cpu_s: float


def study_of(seed: int, protocol: Protocol) -> Study:
    """A chest CT, or now and then something else."""
    phantom = generate_mixed(seed, protocol)
    slabs, length_mm = as_slabs(phantom), len(phantom.z_mm) * phantom.slice_mm
    shown = targets_of(slabs, TOKENS_PER_SIDE).present[..., Sign.NODULE] > 0 if protocol is SLABS else None
    return Study(
        seed=seed,
        images=images_of(phantom),
        guide=guide_of(slabs),
        labels=phantom.labels,
        thin_slices=max(SLAB_COUNT, round(length_mm / (THIN.slice_mm or length_mm))),
        nodules=shown,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A study through processor and tower: every input, so that settings can share it."""

    study: Study
    prepared: Prepared
    encoded: Encoded
    cpu_s: float


@torch.inference_mode()
def look(host: Host, study: Study) -> Seen:
    begun = process_time()
    prepared = host.prepare(study.images)
    every = torch.ones(len(study.images), dtype=torch.bool)
    encoded = host.encode(prepared, every, host.groups(prepared), scored=True)
    return Seen(study, prepared, encoded, process_time() - begun)


@torch.inference_mode()
def read_together(
    host: Host, seen: Sequence[Seen], prompt: str, pruning: PruningSettings, *, max_new_tokens: int = 128
) -> list[Reading]:
    """Prune each study as `Host.read` does, then let the language model read all of them in one batch."""
    begun = process_time()
    prompts, parts = [], []
    for one in seen:
        choice = choose_slices(one.prepared.pixels, pruning, one.study.guide)
        kept, encoded = choice.kept, one.encoded
        scored = pruning.method != "off" and pruning.token_stage
        some = Encoded(
            encoded.features[kept],
            (),
            encoded.received[kept] if scored and encoded.received is not None else None,
            encoded.keys[kept] if scored and encoded.keys is not None else None,
        )
        known = guards(one.study.guide, pruning, choice, host.token_grid(one.prepared))
        reduced = choose_tokens(some, pruning, known)
        asked = host.ask(prompt, one.prepared, choice, DroppedSlices(pruning.dropped_slices))
        prompts.append(prune(asked, host.placeholder, reduced, ()))
        parts.append((choice, reduced))
    said = host.decode(prompts, [max_new_tokens] * len(prompts)).tokens
    each = (process_time() - begun) / max(1, len(seen))
    readings = []
    for one, (choice, reduced), tokens in zip(seen, parts, said, strict=True):
        own = np.zeros((len(choice.kept), reduced.kept.shape[1]), bool)
        own[choice.kept.numpy()] = reduced.kept.cpu().numpy()
        nodules = one.study.nodules
        readings.append(
            Reading(
                seed=one.study.seed,
                text=host.text_of(tokens),
                slices_in=len(choice.kept),
                slices_kept=int(choice.kept.sum()),
                tokens_in=own.size,
                tokens_kept=int(own.sum()),
                survived=bool((own & nodules).any()) if nodules is not None and nodules.any() else None,
                cpu_s=one.cpu_s + each,
            )
        )
    return readings
