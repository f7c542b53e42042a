"""Which nodules does the language model still get, by size, method and token budget? (`./run bench lesions`)

A nodule survives when a token of its own, that nothing was merged into and that was merged into nothing, is kept at a
place where the input shows at least half of the nodule's native peak contrast. Phantoms only; no patient was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import process_time
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from service.shared.messages import SliceOperation
from service.shared.settings import ModelSettings, PruningSettings
from tests.bench.nodules import DIAMETERS_MM, SLICE_MM, Case, Floats, Planted, make_case
from workers.demo_model.channels import USUAL_VOXEL_MM, ct_images, to_halves
from workers.guide import make_guide, pool, pooled_shape
from workers.preprocess import CT_WINDOWS_HU, Slab, combine, sample, slabs, to_grey
from workers.pruning.attention import received_attention
from workers.pruning.groups import blocks, group_mean
from workers.pruning.slices import SliceChoice, keep_all, keep_changed
from workers.pruning.tokens import Reduced, keep_every_token, reduce_tokens
from workers.regions import Spacing
from workers.vlm.encode import Encoded
from workers.vlm.stages import choose_slices, choose_tokens, guards

TUNING_SEED, REPORTING_SEED = 90_000, 70_000
PIXELS = 320
BUDGETS = (0.03, 0.05, 0.10, 0.20)  # of the tokens of the unpruned thin series
HALF = 0.5  # of the native peak contrast
TOUCHED = 0.15  # of it: the token alone must hold this much of the nodule
COSTLY = ("medpruner",)  # needs the tower on every thin slice


class Tower(Protocol):
    """Scores and keys of the tokens of some inputs, and the grid they lie on."""

    rows: int
    columns: int
    name: str

    def images(self, hu: Floats) -> NDArray[np.uint8]: ...

    def encode(self, images: NDArray[np.uint8]) -> Encoded: ...


class RandomTower:
    """One attention layer that was never trained, at MedGemma's token grid: its attention is noise."""

    name = "one random attention layer, 32 x 32 patches, 16 x 16 tokens"
    rows = columns = 16

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self._embed = torch.randn(7 * 7 * 3, 32, generator=random) / 12
        self._place = torch.randn(1024, 32, generator=random) * 0.3
        self._query, self._key = (torch.randn(32, 32, generator=random) / 4 for _ in range(2))
        self._groups = blocks(32, 32, 2)

    def images(self, hu: Floats) -> NDArray[np.uint8]:
        """MedGemma's windows, as small as this tower takes them."""
        return resized(rgb(hu))

    def encode(self, images: NDArray[np.uint8]) -> Encoded:
        patches = torch.from_numpy(images).float().div(127.5).sub(1)
        patches = patches.view(-1, 32, 7, 32, 7, 3).permute(0, 1, 3, 2, 4, 5).reshape(len(images), 1024, -1)
        hidden = torch.nn.functional.layer_norm(patches @ self._embed + self._place, (32,))
        queries, keys = (
            (hidden @ weight).view(len(images), 1024, 2, 16).transpose(1, 2) for weight in (self._query, self._key)
        )
        mean_keys = group_mean(keys.mean(dim=1), self._groups)
        received = group_mean(received_attention(queries, keys, scale=0.25), self._groups)
        return Encoded(mean_keys, (), received, mean_keys)


class FolderTower:
    """The vision tower of a model folder, through its host; images with the channels that it was trained on."""

    def __init__(self, folder: Path) -> None:
        from workers.vlm import open_model

        self._host: Any = open_model(ModelSettings(device="cpu"), folder)
        self.name = f"{self._host.identity.name} ({self._host.identity.weights_sha256[:12]})"
        prepared = self._host.prepare(np.zeros((1, 8, 8, 3), np.uint8))
        self.rows, self.columns = self._host.token_grid(prepared)
        self._pixels = self._host.preprocessing.get("pixels")

    def images(self, hu: Floats) -> NDArray[np.uint8]:
        """MedGemma's windows, or those of the demonstration model with its blobs; a slice is taken for its slab."""
        if self._pixels is None:
            return rgb(hu)
        return ct_images(to_halves(hu, len(hu), self._pixels), USUAL_VOXEL_MM)

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> Encoded:
        prepared = self._host.prepare(images)
        kept = torch.ones(len(images), dtype=torch.bool)
        encoded: Encoded = self._host.encode(prepared, kept, self._host.groups(prepared), scored=True)
        return encoded


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What one method made of one case: its inputs, which were encoded, and which tokens are their own."""

    inputs: tuple[Slab, ...]
    operation: SliceOperation
    encoded: NDArray[np.bool_]  # (I,)
    own: NDArray[np.bool_]  # (I, n)
    tokens_kept: int


def rgb(inputs: Floats) -> NDArray[np.uint8]:
    """(I, H, W) HU to (I, H, W, 3) as the model's processor gets them."""
    return np.stack([to_grey(inputs, low, high) for low, high in CT_WINDOWS_HU], axis=-1)


def resized(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """To 224 x 224, as a processor would."""
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR)) for image in images]
    )


def some(encoded: Encoded, kept: Tensor) -> Encoded:
    assert encoded.received is not None
    assert encoded.keys is not None
    return Encoded(encoded.features[kept], (), encoded.received[kept], encoded.keys[kept])


def shown(inputs: tuple[Slab, ...], operation: SliceOperation, choice: SliceChoice, reduced: Reduced) -> Shown:
    """Own tokens: kept, not merged, and no target."""
    kept = choice.kept.numpy()
    own = np.zeros((len(inputs), reduced.kept.shape[1]), bool)
    targets = torch.zeros_like(reduced.kept)
    for row, into in zip(targets, reduced.merged_into, strict=True):
        row[into[into >= 0]] = True
    own[kept] = (reduced.kept & ~targets).numpy()
    return Shown(inputs, operation, kept, own, int(reduced.kept.sum()))


class Methods:
    """One case by every method; what several of them need is computed once."""

    def __init__(self, case: Case, tower: Tower) -> None:
        self.case, self.tower = case, tower
        self.thin = tuple(Slab(index, index + 1) for index in range(len(case.hu)))
        self._choices: dict[float, SliceChoice] = {}
        self.tokens_thin = len(case.hu) * tower.rows * tower.columns
        self._slabs: dict[tuple[float, str], tuple[tuple[Slab, ...], Encoded, Any, Tensor]] = {}

    @cached_property
    def thin_images(self) -> NDArray[np.uint8]:
        return self.tower.images(self.case.hu)

    @cached_property
    def thin_encoded(self) -> Encoded:
        return self.tower.encode(self.thin_images)

    @cached_property
    def thin_pixels(self) -> Tensor:
        return torch.from_numpy(self.thin_images).float().div_(127.5).sub_(1)

    def uniform(self, budget: float) -> Shown:
        """Every so-many-th thin slice with all its tokens."""
        chosen = sample(len(self.thin), max(1, round(budget * len(self.thin))))
        kept = torch.zeros(len(self.thin), dtype=torch.bool)
        kept[list(chosen)] = True
        choice = SliceChoice(kept, torch.arange(len(self.thin)), torch.zeros(len(self.thin)))
        return shown(self.thin, SliceOperation.MEAN, choice, self._every_token(len(chosen)))

    def medpruner(self, budget: float, tau: float = 0.9) -> Shown:
        """The paper's rule on all thin slices; tau as in the paper, gamma as the budget asks for."""
        low, high, best = 0.0, 0.32, None
        for _ in range(8):
            gamma = (low + high) / 2
            choice = self._choices.get(gamma) or keep_changed(self.thin_pixels, gamma=gamma)
            self._choices[gamma] = choice
            encoded = some(self.thin_encoded, choice.kept)
            assert encoded.received is not None
            assert encoded.keys is not None
            reduced = reduce_tokens(
                encoded.received, encoded.keys, encoded.features, tau=tau, temperature=2.0, contextual_fraction=0.05
            )
            one = shown(self.thin, SliceOperation.MEAN, choice, reduced)
            if best is None or abs(one.tokens_kept - budget * self.tokens_thin) < abs(
                best.tokens_kept - budget * self.tokens_thin
            ):
                best = one
            low, high = (gamma, high) if one.tokens_kept > budget * self.tokens_thin else (low, gamma)
        assert best is not None
        return best

    def guarded(self, budget: float, **knobs: Any) -> Shown:
        """Ours, as the pipeline runs it, with that many tokens as its budget."""
        number = max(2, int(budget * self.tokens_thin))
        settings = PruningSettings.model_validate({"method": "guarded", "token_budget": number} | knobs)
        inputs, encoded, guide, pixels = self._of_slabs(settings.slab_mm, settings.slab_operation)
        choice = choose_slices(pixels, settings, guide)
        guarding = guards(guide, settings, choice, (self.tower.rows, self.tower.columns))
        reduced = choose_tokens(some(encoded, choice.kept), settings, guarding)
        return shown(inputs, SliceOperation(settings.slab_operation), choice, reduced)

    def slabs_alone(self, budget: float) -> Shown:
        """Slabs so thick that all their tokens meet the budget."""
        wanted = max(1, round(budget * len(self.thin)))
        inputs = slabs(len(self.thin), SLICE_MM, SLICE_MM, wanted)
        everything = keep_all(len(inputs))
        return shown(inputs, SliceOperation.MEAN, everything, self._every_token(len(inputs)))

    def _every_token(self, inputs: int) -> Reduced:
        return keep_every_token(torch.zeros(inputs, self.tower.rows * self.tower.columns, 1))

    def _of_slabs(self, slab_mm: float, operation: str) -> tuple[tuple[Slab, ...], Encoded, Any, Tensor]:
        if (slab_mm, operation) not in self._slabs:
            hu, pixel = self.case.hu, self.case.pixel_mm
            inputs = slabs(len(hu), SLICE_MM, slab_mm, 85)
            images = np.stack([combine(hu[one.first : one.last], SliceOperation(operation)) for one in inputs])
            shape = pooled_shape(*hu.shape[1:], pixel, pixel)
            places = np.array([(one.first + one.last) / 2 * SLICE_MM for one in inputs])
            side = pixel * hu.shape[1] / shape[0], pixel * hu.shape[2] / shape[1]
            guide = make_guide(
                np.stack([pool(image, shape) for image in images]),
                places,
                spacing=Spacing(float(np.median(np.diff(places))), *side),
                modality="CT",
            )
            encoded = self.tower.encode(self.tower.images(images))
            self._slabs[slab_mm, operation] = inputs, encoded, guide, torch.zeros(len(inputs), 1)
        return self._slabs[slab_mm, operation]


def survival(case: Case, nodule: Planted, result: Shown, tower: Tower) -> tuple[bool, bool, bool]:
    """(an own token holds some of it, an encoded input shows half of it, both at one place)."""
    own = contrast = both = False
    z0, y0, x0 = nodule.first
    depth, height, width = nodule.added.shape
    rows = (np.arange(y0, y0 + height) * tower.rows) // case.hu.shape[1]
    columns = (np.arange(x0, x0 + width) * tower.columns) // case.hu.shape[2]
    token = rows[:, None] * tower.columns + columns[None, :]
    for index, slab in enumerate(result.inputs):
        first, last = max(slab.first, z0), min(slab.last, z0 + depth)
        if first >= last or not result.encoded[index]:
            continue
        added = np.zeros((slab.last - slab.first, height, width), np.float32)
        added[first - slab.first : last - slab.first] = nodule.added[first - z0 : last - z0]
        with_it = case.hu[slab.first : slab.last, y0 : y0 + height, x0 : x0 + width]
        change = np.abs(combine(with_it, result.operation) - combine(with_it - added, result.operation))
        share = change / nodule.native
        contrast |= bool(share.max() >= HALF)
        mine = result.own[index][token]
        own |= bool(mine[share >= TOUCHED].any())
        both |= bool(mine[share >= HALF].any())
    return own, contrast, both


def runs(methods: Methods, names: list[str], budgets: tuple[float, ...]) -> Iterator[tuple[str, float, Shown]]:
    """Every method at every budget."""
    known: dict[str, Callable[[float], Shown]] = {
        "guarded": methods.guarded,
        "medpruner": methods.medpruner,
        "uniform": methods.uniform,
        "slabs alone": methods.slabs_alone,
        "guarded, mip": lambda budget: methods.guarded(budget, slab_operation="mip"),
        "guarded, 5 mm": lambda budget: methods.guarded(budget, slab_mm=5.0),
        "guarded, attention alone": lambda budget: methods.guarded(
            budget, coverage_lung=0, coverage_other=0, salience_floor=1e9
        ),
        "guarded, no lung promise": lambda budget: methods.guarded(budget, coverage_lung=0.1),
        "guarded, no floor": lambda budget: methods.guarded(budget, salience_floor=1e9),
    }
    for name in names:
        for budget in budgets:
            yield name, budget, known[name](budget)


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if not trials:
        return 0.0, 1.0
    share, square = hits / trials, z * z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * (share * (1 - share) / trials + square / (4 * trials * trials)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(case: Case, tower: Tower, names: list[str], budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """One record per method and budget: tokens, and for each size the nodules, and those that survive."""
    methods = Methods(case, tower)
    records = []
    for name, budget, result in runs(methods, names, budgets):
        sizes: dict[str, list[int]] = {str(size): [0, 0, 0, 0] for size in DIAMETERS_MM}
        for nodule in case.nodules:
            tally = sizes[str(nodule.diameter_mm)]
            tally[0] += 1
            for place, seen in enumerate(survival(case, nodule, result, tower), 1):
                tally[place] += seen
        slab_tokens = len(result.inputs) * tower.rows * tower.columns
        records.append(
            {
                "seed": case.seed,
                "method": name,
                "budget": budget,
                "kept": result.tokens_kept,
                "thin": methods.tokens_thin,
                "slab": slab_tokens,
                "sizes": sizes,
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: share that survives with its 95 % interval; the two criteria alone behind it."""
    sizes = " | ".join(f"{size} mm" for size in DIAMETERS_MM)
    yield f"| method | tokens of the thin series | tokens of its own input | {sizes} |"
    yield "|---" * (3 + len(DIAMETERS_MM)) + "|"
    for method, budget in dict.fromkeys((one["method"], one["budget"]) for one in records):
        rows = [one for one in records if (one["method"], one["budget"]) == (method, budget)]
        kept, thin, slab = (sum(one[key] for one in rows) for key in ("kept", "thin", "slab"))
        cells = []
        for size in map(str, DIAMETERS_MM):
            trials, own, contrast, both = (sum(one["sizes"][size][place] for one in rows) for place in range(4))
            low, high = wilson(both, trials)
            cells.append(f"{both}/{trials} **{both / max(trials, 1):.3f}** ({low:.3f}–{high:.3f}); {own}, {contrast}")
        yield f"| {method} | {kept / thin:.1%} | {kept / slab:.1%} | {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run bench lesions", description=__doc__)
    parser.add_argument("--cases", type=int, default=42, help="chests; each holds five nodules of each size")
    parser.add_argument("--first", type=int, default=0, help="of the seeds, to share the work among processes")
    parser.add_argument("--tune", action="store_true", help="the seeds that defaults are chosen on, not reported")
    parser.add_argument("--methods", default="guarded,medpruner,uniform,slabs alone,guarded, attention alone")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument(
        "--costly-every", type=int, default=1, help=f"run {', '.join(COSTLY)} on every so-many-th chest"
    )
    parser.add_argument("--model", type=Path, help="a model folder for the tower; else one random layer")
    parser.add_argument("--records", type=Path, help="keep one line of JSON per result here, and go on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [name.replace(";", ",") for name in options.methods.replace(", ", "; ").split(",")]
    budgets = tuple(map(float, options.budgets.split(",")))
    tower: Tower = FolderTower(options.model) if options.model else RandomTower()
    records = []
    if options.records and options.records.exists():
        records = [json.loads(line) for line in options.records.read_text().splitlines()]
    done = {record["seed"] for record in records}
    start_seed = (TUNING_SEED if options.tune else REPORTING_SEED) + options.first
    for seed in range(start_seed, start_seed + options.cases):
        if seed in done:
            continue
        start = process_time()
        some_names = [name for name in names if name not in COSTLY or seed % options.costly_every == 0]
        new = measure(make_case(seed, pixels=PIXELS, per_size=5), tower, some_names, budgets)
        records += new
        if options.records:
            with options.records.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in new)
        print(f"seed {seed}: {process_time() - start:.1f} CPU-s", file=sys.stderr, flush=True)  # noqa: T201
    print(f"Tower: {tower.name}. {len({r['seed'] for r in records})} chests of {PIXELS} x {PIXELS} pixels.\n")  # noqa: T201
    print("\n".join(table(records)))  # noqa: T201
    return 0
