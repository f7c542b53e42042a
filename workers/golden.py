"""Compare this code with recorded outputs of the published MedPruner code.

A golden folder holds one folder per host (config.json, model.safetensors, overlay-*.safetensors, one file per
case) and `stage/`; tests/golden/README.md says what is in them. Reference semantics run here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from service.shared.messages import ModelIdentity
from workers.pruning import reference
from workers.pruning.groups import runs
from workers.pruning.slices import SliceChoice, keep_all, keep_changed
from workers.pruning.tokens import Reduced, keep_every_token
from workers.vlm.assemble import Prompt, prune
from workers.vlm.decoding import greedy
from workers.vlm.encode import Encoded, Prepared
from workers.vlm.folder import Opened, architecture_of, load_weights
from workers.vlm.gemma3 import Gemma3
from workers.vlm.host import Host
from workers.vlm.patches import patches
from workers.vlm.qwen3_vl import Qwen3VL
from workers.vlm.video_llama3 import VideoLlama3

CONTEXTUAL_FRACTION = 0.05  # of every recorded host case

# Largest allowed absolute difference; from the README of the recorded data.
SCORE, FEATURE, LOGIT, MERGED = 3e-4, 2e-4, 1e-4, 1e-5
# Times as much where the weights make much of a rounding: where others are 1e-6 apart, the instruction sets of one
# processor leave a sink's features 2e-4 to 5e-4 apart, and received attention up to 1.4e-3.
ROUNDING = {"model+overlay-sink": 6}
EXACT = 0.0

Row = tuple[str, float, float]  # quantity, measured, tolerance


@dataclass(frozen=True, slots=True)
class Difference:
    """One recorded tensor against ours."""

    case: str  # "gemma3/both"
    quantity: str
    measured: float  # largest absolute difference; number of unequal entries where the tolerance is EXACT
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.tolerance  # False for NaN


def check(folder: Path) -> list[Difference]:
    """Compare every case below `folder`; ValueError where nothing is there to compare or a tensor is missing."""
    differences: list[Difference] = []
    for host in sorted(path.parent for path in folder.glob("*/config.json")):
        differences += check_host(host)
    if (folder / "stage").is_dir():
        differences += check_stages(folder / "stage")
    if not differences:
        raise ValueError(f"{folder}: no host folders with config.json and cases, and no stage folder")
    return differences


def print_table(differences: list[Difference], console: Console) -> int:
    """Print one line per case and quantity; return 1 where any tolerance is passed, else 0."""
    table = Table("case", "quantity", "difference", "tolerance", "")
    for row in differences:
        tolerance = "exact" if row.tolerance == EXACT else f"{row.tolerance:.0e}"
        table.add_row(row.case, row.quantity, f"{row.measured:.1e}", tolerance, "ok" if row.passed else "PASSED")
    console.print(table)
    beyond = sum(not row.passed for row in differences)
    console.print(f"{len(differences)} comparisons, {beyond} beyond their tolerance")
    return 1 if beyond else 0


def check_host(folder: Path) -> list[Difference]:
    """Compare all cases of one host; each set of weights is loaded once."""
    cases = sorted(path for path in folder.glob("*.safetensors") if not _is_weights(path))
    by_weights: dict[str, list[Path]] = {}
    for case in cases:
        by_weights.setdefault(weights_of(case), []).append(case)
    differences: list[Difference] = []
    for weights, paths in by_weights.items():
        host = open_golden(folder, weights)
        for path in paths:
            differences += [Difference(f"{folder.name}/{path.stem}", *row) for row in _checked(host, path, weights)]
    return differences


def _checked(host: Host, path: Path, weights: str) -> list[Row]:
    try:
        return check_case(host, load_file(path), weights)
    except KeyError as error:
        raise ValueError(f"{path}: holds no tensor {error}") from error


def weights_of(case: Path) -> str:
    """Which weights a case was recorded with: `model` or `model+overlay-X`."""
    with safe_open(case, "pt") as file:
        return str((file.metadata() or {}).get("weights", "model"))


def open_golden(folder: Path, weights: str = "model", attention: str = "sdpa") -> Host:
    """Load a golden host in float32 on the CPU, without tokenizer or processor, and lay the overlay over it."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    architecture = architecture_of(folder)
    identity = ModelIdentity(
        name=folder.name,
        architecture=architecture,
        path=str(folder),
        weights_sha256="",
        transformers_version=transformers.__version__,
        torch_version=str(torch.__version__),
        dtype="float32",
        device="cpu",
        attention=attention,
    )
    opened = Opened(folder, torch.device("cpu"), torch.float32, attention, identity, ())
    host = _host(architecture, opened)
    for overlay in weights.split("+")[1:]:
        _, unexpected = host.model.load_state_dict(load_file(folder / f"{overlay}.safetensors"), strict=False)
        if unexpected:
            raise ValueError(f"{folder}/{overlay}.safetensors: no such weights: {', '.join(unexpected)}")
    return host


def _host(architecture: str, opened: Opened) -> Host:
    if architecture == "Gemma3ForConditionalGeneration":
        return Gemma3(opened, load_weights(Gemma3.architecture_class, opened, opened.attention), None)
    other = {"Qwen3VLForConditionalGeneration": Qwen3VL, "VideoLlama3ForConditionalGeneration": VideoLlama3}
    if architecture not in other:
        raise ValueError(f"{opened.folder}: golden folders hold the stock classes, not {architecture}")
    host = other[architecture]
    return host(opened, load_weights(host.architecture_class, opened, opened.attention), None, None)


@torch.inference_mode()
def check_case(host: Host, case: dict[str, Tensor], weights: str = "model") -> list[Row]:
    """Run one case with the reference's semantics and compare every recorded tensor. weights: see `weights_of`."""
    feature, score = (ROUNDING.get(weights, 1) * allowed for allowed in (FEATURE, SCORE))
    prepared, prompt = prepared_of(host, case), prompt_of(host, case)
    choice = slices_of(prepared, case)
    encoded = encode_all(host, prepared, case)
    reduced, kept = tokens_of(encoded, choice, case)
    pruned = prune(prompt, host.placeholder, Reduced(reduced.features, kept, kept, kept), encoded.deepstack)
    survives = torch.ones_like(prompt.input_ids, dtype=torch.bool)
    survives[prompt.input_ids == host.placeholder] = kept.flatten()
    length = len(pruned.input_ids)
    positions = torch.arange(length)[None] if pruned.positions is None else pruned.positions[:, None]
    kept_share = torch.stack(
        [
            reference.token_mask(choice.kept, torch.ones_like(kept)).float().mean(),
            reduced.kept.float().mean(),
            kept.float().mean(),
        ]
    )
    rows: list[Row] = [
        ("slice_kept", _unequal(choice.kept, case["slice_kept"]), EXACT),
        ("token_stage_mask", _unequal(reduced.kept, case["token_stage_mask"]), EXACT),
        ("token_kept", _unequal(kept, case["token_kept"]), EXACT),
        ("seq_kept", _unequal(survives, case["seq_kept"]), EXACT),
        ("kept_length", _unequal(torch.tensor([length]), case["kept_length"]), EXACT),
        ("position_ids", _unequal(positions, case["position_ids"]), EXACT),
        ("rates", _apart(kept_share, case["rates"]), MERGED),
        ("features_before", _apart(encoded.features, case["features_before"]), feature),
    ]
    if encoded.received is not None and encoded.keys is not None:
        rows += [
            ("received", _apart(encoded.received, case["received"]), score),
            ("mean_keys", _apart(encoded.keys, case["mean_keys"]), score),
            ("features_after", _apart(reduced.features, case["features_after"]), feature),
        ]
    rows += [
        (f"deepstack_kept_{index}", _apart(layer, case[f"deepstack_kept_{index}"]), FEATURE)
        for index, layer in enumerate(pruned.deepstack)
    ]
    rows += list(_logits(host, host.arguments([pruned]), case))
    rows += _kept_only(host, prepared, choice, encoded, case)
    if bool(kept.all()):
        rows += _stock(host, host.arguments([pruned]), case)
    return rows


def prepared_of(host: Host, case: dict[str, Tensor]) -> Prepared:
    """The recorded pixels, as the host's processor would give them."""
    pixels = case["pixel_values"].float()
    if isinstance(host, Gemma3):
        return host.prepared(pixels)
    grid = case["image_grid_thw" if isinstance(host, Qwen3VL) else "grid_thw"][0]
    return patches(pixels, int(grid[1]), int(grid[2]))


def prompt_of(host: Host, case: dict[str, Tensor]) -> Prompt:
    """The recorded prompt, with the positions of the host where they are not in order."""
    ids = case["input_ids"][0]
    if isinstance(host, Qwen3VL):
        return Prompt(ids, host.positions(ids, prepared_of(host, case), len(case["slice_kept"])))
    return Prompt(ids)


def slices_of(prepared: Prepared, case: dict[str, Tensor]) -> SliceChoice:
    """The slice stage of the case."""
    if not bool(case["slice_stage"]):
        return keep_all(len(prepared.pixels))
    return keep_changed(prepared.pixels, gamma=float(case["gamma"]))


def encode_all(host: Host, prepared: Prepared, case: dict[str, Tensor]) -> Encoded:
    """Every slice through the tower, patches grouped as the reference groups them."""
    groups = runs(prepared.patch_rows * prepared.patch_columns, int(case["group_size"]))
    every = torch.ones(len(prepared.pixels), dtype=torch.bool)
    return host.encode(prepared, every, groups, scored=bool(case["token_stage"]))


def tokens_of(encoded: Encoded, choice: SliceChoice, case: dict[str, Tensor]) -> tuple[Reduced, Tensor]:
    """The token stage of the case, and the final mask of both stages, (S, n) bool."""
    if encoded.received is None or encoded.keys is None:
        reduced = keep_every_token(encoded.features)
    else:
        reduced = reference.reduce_tokens(
            encoded.received,
            encoded.keys,
            encoded.features,
            tau=float(case["tau"]),
            temperature=float(case["temperature"]),
            contextual_fraction=CONTEXTUAL_FRACTION,
        )
    return reduced, reference.token_mask(choice.kept, reduced.kept)


def generate(host: Host, arguments: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """Generate `steps` tokens without an end and return them, (steps,), with their logits, (steps, V)."""
    config = greedy(steps, [], 0)
    config.output_logits = True
    config.return_dict_in_generate = True
    try:
        output = host.model.generate(**arguments, generation_config=config)
    finally:
        host.forget()
    return output.sequences[0, -steps:], torch.cat(output.logits)


def _logits(host: Host, arguments: dict[str, Any], case: dict[str, Tensor]) -> Iterator[Row]:
    """Greedy tokens and logits. On Gemma 3 in two variants: causal over images, and in both directions."""
    if not isinstance(host, Gemma3):
        tokens, logits = generate(host, arguments, len(case["decode_tokens"]))
        yield "prefill_logits", _apart(logits[0], case["prefill_logits"]), LOGIT
        yield "decode_tokens", _unequal(tokens, case["decode_tokens"]), EXACT
        yield "decode_logits", _apart(logits, case["decode_logits"]), LOGIT
        return
    causal = {key: value for key, value in arguments.items() if key != "token_type_ids"}
    for variant, given in (("causal", causal), ("bidirectional", arguments)):
        tokens, logits = generate(host, given, len(case[f"decode_tokens_{variant}"]))
        yield f"decode_tokens_{variant}", _unequal(tokens, case[f"decode_tokens_{variant}"]), EXACT
        yield f"decode_logits_{variant}", _apart(logits, case[f"decode_logits_{variant}"]), LOGIT
        if variant == "causal":
            first = case["reference_logits_causal_first2"]
            yield "prefill_logits_causal", _apart(logits[0], case["prefill_logits_causal"]), LOGIT
            yield "reference_logits_causal_first2", _apart(logits[: len(first)], first), LOGIT


def _kept_only(
    host: Host, prepared: Prepared, choice: SliceChoice, encoded: Encoded, case: dict[str, Tensor]
) -> list[Row]:
    """Dropping slices before the tower changes no bit of the others."""
    if bool(choice.kept.all()):
        return []
    groups = runs(prepared.patch_rows * prepared.patch_columns, int(case["group_size"]))
    early = host.encode(prepared, choice.kept, groups, scored=bool(case["token_stage"]))
    rows: list[Row] = [("features, early drop", _unequal(early.features, encoded.features[choice.kept]), EXACT)]
    if early.received is not None and encoded.received is not None:
        rows.append(("received, early drop", _unequal(early.received, encoded.received[choice.kept]), EXACT))
    return rows


def _stock(host: Host, arguments: dict[str, Any], case: dict[str, Tensor]) -> list[Row]:
    """With every token kept, prefill and decode steps are those of the stock class, bit for bit."""
    steps = len(case["decode_tokens_bidirectional" if isinstance(host, Gemma3) else "decode_tokens"])
    _, stock = generate(host, stock_arguments(host, case), steps)
    _, ours = generate(host, arguments, steps)
    return [("off against stock", _unequal(ours, stock), EXACT)]


def stock_arguments(host: Host, case: dict[str, Tensor]) -> dict[str, Any]:
    """What the stock class is called with when nobody prunes: the whole prompt and the pixels."""
    given: dict[str, Any] = {key: case[key] for key in ("input_ids", "attention_mask")}
    pixels = case["pixel_values"].float()
    if isinstance(host, Gemma3):
        return given | {"pixel_values": pixels, "token_type_ids": case["token_type_ids"]}
    if isinstance(host, Qwen3VL):
        visual = (case["input_ids"] == host.placeholder).long()
        return given | {
            "pixel_values": pixels,
            "image_grid_thw": case["image_grid_thw"],
            "mm_token_type_ids": visual,
        }
    return given | {
        "pixel_values": pixels,
        "image_grid_thw": case["grid_thw"],
        "image_merge_sizes": case["merge_sizes"],
    }


def check_stages(folder: Path) -> list[Difference]:
    """Compare the two stages alone, without any host."""
    differences = []
    for path in sorted(folder.glob("*.safetensors")):
        case = load_file(path)
        rows = _slice_stage(case) if path.stem.startswith("slices-") else _token_stage(case)
        differences += [Difference(f"stage/{path.stem}", *row) for row in rows]
    return differences


def _slice_stage(case: dict[str, Tensor]) -> list[Row]:
    choice = keep_changed(case["pixels"].float(), gamma=float(case["gamma"]))
    return [
        ("kept", _unequal(choice.kept, case["kept"]), EXACT),
        ("anchor", _unequal(choice.anchor, case["anchor"]), EXACT),
        ("l1_to_anchor", _apart(choice.distance[1:], case["l1_to_anchor"][1:]), 1e-9),
    ]


def _token_stage(case: dict[str, Tensor]) -> list[Row]:
    """Where equal scores lie at the cut, the reference's unstable sort decided: a stable one is compared with."""
    reduced = reference.reduce_tokens(
        case["received"],
        case["keys"],
        case["features"],
        tau=float(case["tau"]),
        temperature=float(case["temperature"]),
        contextual_fraction=float(case["contextual_ratio"]),
    )
    if bool(case["tie_at_cut"].any()):
        return [
            ("kept, stable order", _unequal(reduced.kept, case["kept_stable_sort"]), EXACT),
            ("number kept", _unequal(reduced.kept.sum(-1), case["kept"].sum(-1)), EXACT),
        ]
    return [
        ("kept", _unequal(reduced.kept, case["kept"]), EXACT),
        ("assigned_to", _unequal(reduced.merged_into, case["assigned_to"]), EXACT),
        ("merged_features", _apart(reduced.features, case["merged_features"]), MERGED),
    ]


def _is_weights(path: Path) -> bool:
    return path.stem == "model" or path.stem.startswith("overlay-")


def _unequal(ours: Tensor, recorded: Tensor) -> float:
    """How many entries differ; all of them where the shapes do."""
    if ours.shape != recorded.shape:
        return float(max(ours.numel(), recorded.numel(), 1))
    return float((ours != recorded).sum())


def _apart(ours: Tensor, recorded: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    if ours.shape != recorded.shape:
        return float("inf")
    return float((ours.double() - recorded.double()).abs().max()) if ours.numel() else 0.0


def describe(differences: list[Difference]) -> str:
    """The differences beyond tolerance as JSON lines, for people and for failing tests."""
    return "\n".join(
        json.dumps({"case": row.case, "quantity": row.quantity, "measured": row.measured, "tolerance": row.tolerance})
        for row in differences
        if not row.passed
    )
