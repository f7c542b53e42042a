"""A pool of rendered scenes for training: each is scanned several times with fresh noise and nodules, then replaced.

Everything is drawn from (seed, rank, step), so that a run that is stopped and taken up again goes on with new data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.channels import ct_images, mr_images, to_halves, to_slabs, voxel_of_halves
from workers.demo_model.labels import Labels
from workers.demo_model.paste import paste
from workers.demo_model.phantom import (
    Modality,
    Phantom,
    Protocol,
    Scene,
    as_slabs,
    build,
    draw_kind,
    scan,
    without_noise,
)
from workers.demo_model.targets import Targets, targets_of

Voxel = TypeVar("Voxel", np.uint8, np.int16)

PATCHES_PER_SIDE, TOKENS_PER_SIDE = 12, 6
MOST_MOVED = 5  # pixels: half a patch
TRAINING_SEEDS = 1_000_000_000  # seeds from here on are for training; those below are never trained on


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One scene and its dense targets on both grids."""

    scene: Scene
    patches: Targets
    tokens: Targets


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One scanned study. images: (S, P, P, 3) uint8, the slabs that the model sees of it."""

    images: NDArray[np.uint8]
    phantom: Phantom
    member: Member

    @property
    def labels(self) -> Labels:
        return self.member.scene.labels


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the scenes are like. `nodules`: how many at most are pasted into each chest at every scan.
    `plaques_share`: of the chests without plaques, how many are then given some.
    """

    size: int = 120
    fresh: int = 1  # scenes replaced per batch
    other_share: float = 0.15
    nodules: int = 8
    plaques_share: float = 0.35


def examples(seed: int, rank: int, first_step: int, batch: int, mixture: Mixture) -> Iterator[list[Example]]:
    """Batches without end, beginning at `first_step`."""
    counter = TRAINING_SEEDS + ((seed * 64 + rank) * 10_000_000) + first_step * mixture.fresh * 2
    random = np.random.default_rng((seed, rank, first_step))
    members: list[Member] = []
    while True:
        wanted = mixture.fresh if len(members) >= min(mixture.size, batch * 3) else batch
        for _ in range(wanted):
            counter += 1
            members.append(_member(counter, random, mixture))
        del members[: max(0, len(members) - mixture.size)]
        chosen = random.choice(len(members), size=min(batch, len(members)), replace=False)
        yield [expose(_fresh(members[index], random, mixture), random) for index in chosen]


def expose(member: Member, random: np.random.Generator) -> Example:
    """Scan a scene once more."""
    phantom = scan(member.scene, random)
    return Example(images_of(phantom), phantom, member)


def moved(example: Example, random: np.random.Generator) -> Example:
    """The same scan with its field of view up to MOST_MOVED pixels away: nothing is known of what was outside.

    A tower of patches does not know that a nodule across their border is what it is in the middle of one.
    """
    down, right = (int(pixels) for pixels in random.integers(-MOST_MOVED, MOST_MOVED + 1, 2))
    phantom, (x_mm, y_mm) = example.phantom, example.phantom.centre_mm
    there = replace(
        phantom,
        values=_moved(phantom.values, down, right, int(phantom.values.min())),
        masks=_moved(phantom.masks, down, right),
        centre_mm=(x_mm - right * phantom.pixel_mm, y_mm - down * phantom.pixel_mm),
    )
    return Example(_moved(example.images, down, right), there, _with_targets(example.member.scene, as_slabs(there)))


def _moved(stack: NDArray[Voxel], down: int, right: int, outside: int = 0) -> NDArray[Voxel]:
    """(S, H, W) or (S, H, W, channels)."""
    result = np.full_like(stack, outside)
    (to_rows, from_rows), (to_columns, from_columns) = (
        (slice(max(step, 0), size + min(step, 0)), slice(max(-step, 0), size - max(step, 0)))
        for step, size in ((down, stack.shape[1]), (right, stack.shape[2]))
    )
    result[:, to_rows, to_columns] = stack[:, from_rows, from_columns]
    return result


def images_of(phantom: Phantom) -> NDArray[np.uint8]:
    """What the worker's preprocessing makes of this phantom for the demonstration model."""
    halves = to_halves(phantom.values)
    if phantom.modality is not Modality.CT:
        return mr_images(to_slabs(halves))
    spacing_mm = (phantom.slice_mm, phantom.pixel_mm, phantom.pixel_mm)
    return ct_images(halves, voxel_of_halves(spacing_mm, phantom.values.shape, halves.shape))


def _fresh(member: Member, random: np.random.Generator, mixture: Mixture) -> Member:
    """With other nodules than last time."""
    return member_of(paste(member.scene, random, mixture.nodules, mixture.plaques_share))


def member_of(scene: Scene) -> Member:
    return _with_targets(scene, as_slabs(without_noise(scene)))


def _with_targets(scene: Scene, slabs: Phantom) -> Member:
    return Member(scene, targets_of(slabs, PATCHES_PER_SIDE), targets_of(slabs, TOKENS_PER_SIDE))


def _member(seed: int, random: np.random.Generator, mixture: Mixture) -> Member:
    body, modality = draw_kind(random, mixture.other_share)
    protocol = Protocol(120, slices=int(random.integers(20, 60)) if random.random() < 0.3 else 48)
    return member_of(build(seed, protocol, body=body, modality=modality, nodules=0))
