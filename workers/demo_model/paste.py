"""Fresh nodules and plaques in a chest that is already rendered: what a tower of patches lacks is many different ones.

Rendering costs ten times as much as pasting, and a nodule that is seen again is learned by heart.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from workers.demo_model.findings import Nodule, draw_calcifications, draw_nodule
from workers.demo_model.labels import labels_of
from workers.demo_model.phantom import Scene, chest_at
from workers.demo_model.render import Mask, paint_ball

DIAMETERS_MM = ((4.0, 7.0), (7.0, 13.0), (12.0, 30.0))  # logarithmically even within
SHARES = (0.1, 0.5, 0.4)  # of each of these


def paste(scene: Scene, random: np.random.Generator, most: int, plaques_share: float = 0.0) -> Scene:
    """A copy of a chest without nodules, with up to `most`; anything else as it is.

    plaques_share: of the chests without plaques, how many are given some.
    """
    if not scene.labels.supported:
        return scene
    chest, found = chest_at(scene.seed), scene.findings
    nodules: list[Nodule] = []
    for _ in range(int(random.integers(0, most + 1))):
        nodule = draw_nodule(chest, random, found, nodules, diameter_mm=draw_diameter_mm(random))
        if nodule is not None:
            nodules.append(nodule)
    plaques = draw_calcifications(chest, random) if not found.calcifications and random.random() < plaques_share else ()
    hu, masks = scene.hu.copy(), scene.masks.copy()
    for one in nodules:
        paint_ball(hu, masks, scene.grid, one.centre_mm, one.diameter_mm, one.hu, Mask.NODULE)
    for plaque in plaques:
        paint_ball(hu, masks, scene.grid, plaque.centre_mm, plaque.diameter_mm, plaque.hu, Mask.CALCIFICATION)
    added = replace(found, nodules=tuple(nodules), calcifications=found.calcifications + plaques)
    return replace(scene, hu=hu, masks=masks, findings=added, labels=labels_of(added))


def draw_diameter_mm(random: np.random.Generator) -> float:
    """More of those that are hard and still claimed."""
    low, high = DIAMETERS_MM[int(random.choice(len(DIAMETERS_MM), p=SHARES))]
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
