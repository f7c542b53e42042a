"""A pool of rendered scenes for training: each is scanned several times with fresh noise, then replaced.

Where many nodules are wanted, each scan shows fresh ones.

Everything is drawn from (seed, rank, step), so that a run that is stopped and taken up again goes on with new data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.channels import ct_images, mr_images
from workers.demo_model.labels import Labels
from workers.demo_model.other_bodies import Body
from workers.demo_model.paste import paste
from workers.demo_model.phantom import (
    Modality,
    Phantom,
    Protocol,
    Scene,
    build,
    draw_kind,
    findings_at,
    scan,
    without_noise,
)
from workers.demo_model.targets import Targets, targets_of

PATCHES_PER_SIDE, TOKENS_PER_SIDE = 12, 6
SMALL_MM = 7
TRAINING_SEEDS = 1_000_000_000  # seeds from here on are for training; those below are never trained on


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One scene and its dense targets on both grids."""

    scene: Scene
    patches: Targets
    tokens: Targets


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One scanned study. images: (S, P, P, 3) uint8."""

    images: NDArray[np.uint8]
    phantom: Phantom
    member: Member

    @property
    def labels(self) -> Labels:
        return self.member.scene.labels


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the scenes are like. `nodules`: how many at most are pasted into each chest at every scan; None for the
    ordinary share, rendered with the chest.
    """

    size: int = 120
    fresh: int = 1  # scenes replaced per batch
    other_share: float = 0.15
    nodules: int | None = 8
    small_share: float = 1.0  # of the chests whose largest nodule is below SMALL_MM, the rest is drawn again


def examples(seed: int, rank: int, first_step: int, batch: int, mixture: Mixture) -> Iterator[list[Example]]:
    """Batches without end, beginning at `first_step`."""
    counter = TRAINING_SEEDS + ((seed * 64 + rank) * 10_000_000) + first_step * mixture.fresh * 2
    random = np.random.default_rng((seed, rank, first_step))
    members: list[Member] = []
    while True:
        wanted = mixture.fresh if len(members) >= min(mixture.size, batch * 3) else batch
        for _ in range(wanted):
            counter += 1
            while (member := _member(counter, random, mixture)) is None:
                counter += 1
            members.append(member)
        del members[: max(0, len(members) - mixture.size)]
        chosen = random.choice(len(members), size=min(batch, len(members)), replace=False)
        yield [expose(_fresh(members[index], random, mixture.nodules), random) for index in chosen]


def expose(member: Member, random: np.random.Generator) -> Example:
    """Scan a scene once more."""
    phantom = scan(member.scene, random)
    images = ct_images(phantom.values) if phantom.modality is Modality.CT else mr_images(phantom.values)
    return Example(images, phantom, member)


def _fresh(member: Member, random: np.random.Generator, nodules: int | None) -> Member:
    """The member as it is, or with other nodules than last time."""
    return member if nodules is None else member_of(paste(member.scene, random, nodules))


def member_of(scene: Scene) -> Member:
    phantom = without_noise(scene)
    return Member(scene, targets_of(phantom, PATCHES_PER_SIDE), targets_of(phantom, TOKENS_PER_SIDE))


def _member(seed: int, random: np.random.Generator, mixture: Mixture) -> Member | None:
    """None for what the mixture wants less of, before it is rendered."""
    body, modality = draw_kind(random, mixture.other_share)
    protocol = Protocol(120, slices=int(random.integers(20, 25)) if random.random() < 0.3 else 24)
    bare = None if mixture.nodules is None else 0
    if body is Body.CHEST and modality is Modality.CT and mixture.small_share < 1:
        largest = max((one.diameter_mm for one in findings_at(seed, nodules=bare).nodules), default=SMALL_MM)
        if largest < SMALL_MM and random.random() >= mixture.small_share:
            return None
    return member_of(build(seed, protocol, body=body, modality=modality, nodules=bare))
