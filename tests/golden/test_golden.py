"""Every recorded case of the published MedPruner code, on the stock classes: masks exact, logits within tolerance."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from workers import golden
from workers.pruning.groups import runs
from workers.pruning.slices import keep_changed
from workers.pruning.tokens import reduce_tokens
from workers.vlm.host import Host

FOLDER = Path(__file__).parent
HOSTS = ("gemma3", "qwen3vl", "hulumed")
CASES = [
    path
    for host in HOSTS
    for path in sorted((FOLDER / host).glob("*.safetensors"))
    if path.stem != "model" and not path.stem.startswith("overlay-")
]
STAGES = sorted((FOLDER / "stage").glob("*.safetensors"))


@lru_cache(maxsize=2)
def host_of(folder: Path, weights: str) -> Host:
    return golden.open_golden(folder, weights)


def beyond(rows: list[golden.Row]) -> list[golden.Row]:
    return [row for row in rows if not row[1] <= row[2]]


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_reference_is_reproduced(case: Path) -> None:
    """Slices, masks, positions, scores, features and eight decode steps are those of the reference."""
    weights = golden.weights_of(case)

    assert beyond(golden.check_case(host_of(case.parent, weights), load_file(case), weights)) == []


@pytest.mark.parametrize("host", HOSTS)
def test_eager_attention_reproduces_the_reference(host: str) -> None:
    """The kernel is a matter of speed: with eager attention everywhere the same case is reproduced."""
    case = FOLDER / host / "one.safetensors"

    rows = golden.check_case(golden.open_golden(case.parent, attention="eager"), load_file(case))

    assert beyond(rows) == []


def test_all_recorded_cases_are_there() -> None:
    """Three hosts of eight cases each, 27 files of the stages alone; none is left out."""
    assert len(CASES) == 24
    assert len(STAGES) == 27


@pytest.mark.parametrize("host", HOSTS)
def test_off_is_compared_with_the_stock_class(host: str) -> None:
    """With pruning off, prefill and eight decode steps are the stock class's, bit for bit."""
    case = FOLDER / host / "off.safetensors"
    rows = golden.check_case(host_of(case.parent, "model"), load_file(case))

    assert ("off against stock", 0.0, golden.EXACT) in rows


def test_stages_are_reproduced() -> None:
    """Both stages alone, with ties, sinks, drifts and the inputs on which the reference crashes."""
    differences = golden.check_stages(FOLDER / "stage")

    assert golden.describe(differences) == ""


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in STAGES
        if path.stem.startswith("tokens-") and path.stem not in ("tokens-tau0", "tokens-sink_tau1")
    ],
    ids=lambda path: path.stem,
)
def test_corrected_rule_keeps_the_same_tokens(path: Path) -> None:
    """Method `medpruner` differs from the reference in the merge alone (and in tau 1, which keeps all)."""
    case = load_file(path)

    reduced = reduce_tokens(
        case["received"],
        case["keys"],
        case["features"],
        tau=float(case["tau"]),
        temperature=float(case["temperature"]),
        contextual_fraction=float(case["contextual_ratio"]),
    )

    assert torch.equal(reduced.kept, case["kept_stable_sort"])


def test_another_temperature_is_noticed() -> None:
    """The comparison can fail: with the temperature of another host the masks differ."""
    case = FOLDER / "gemma3" / "token.safetensors"
    tensors = load_file(case)
    tensors["temperature"] = torch.tensor([1.0], dtype=torch.float64)

    rows = beyond(golden.check_case(host_of(case.parent, "model"), tensors))

    assert "token_stage_mask" in [row[0] for row in rows]


def test_aligned_groups_are_not_the_references() -> None:
    """On Gemma 3 the reference scores strips of a row, the projector pools blocks: ours keeps other tokens."""
    host = host_of(FOLDER / "gemma3", "model")
    case = load_file(FOLDER / "gemma3" / "token.safetensors")
    prepared = golden.prepared_of(host, case)
    every = torch.ones(len(prepared.pixels), dtype=torch.bool)
    with torch.inference_mode():
        aligned = host.encode(prepared, every, host.groups(prepared), scored=True).received
        strips = host.encode(prepared, every, runs(64 * 64, 16), scored=True).received

    assert aligned is not None
    assert strips is not None
    assert float((aligned - strips).abs().max()) > 0.1


def test_table_says_what_differs(tmp_path: Path) -> None:
    """A folder whose recorded mask was changed ends in exit code 1 and names case and quantity."""
    stage = tmp_path / "stage"
    stage.mkdir()
    shutil.copy(FOLDER / "stage" / "slices-one.safetensors", stage)
    changed = load_file(FOLDER / "stage" / "slices-drift.safetensors")
    changed["kept"][3] = True
    save_file(changed, stage / "slices-drift.safetensors")
    console = Console(record=True, width=120, quiet=True)

    code = golden.print_table(golden.check(tmp_path), console)

    assert code == 1
    assert '"case": "stage/slices-drift", "quantity": "kept"' in golden.describe(golden.check(tmp_path))


def test_matching_folder_ends_in_0(tmp_path: Path) -> None:
    """A folder in which everything agrees ends in exit code 0."""
    (tmp_path / "stage").mkdir()
    shutil.copy(FOLDER / "stage" / "slices-one.safetensors", tmp_path / "stage")

    assert golden.print_table(golden.check(tmp_path), Console(quiet=True)) == 0


def test_case_without_a_tensor_is_named(tmp_path: Path) -> None:
    """A recording that lacks a tensor is an error with its path, not a comparison left out."""
    shutil.copytree(FOLDER / "qwen3vl", tmp_path / "host", ignore=shutil.ignore_patterns("[a-np-z]*.safetensors"))
    shutil.copy(FOLDER / "qwen3vl" / "model.safetensors", tmp_path / "host")
    case = load_file(tmp_path / "host" / "off.safetensors")
    del case["position_ids"]
    save_file(case, tmp_path / "host" / "off.safetensors")

    with pytest.raises(ValueError, match=r"off\.safetensors: holds no tensor 'position_ids'"):
        golden.check(tmp_path)


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    """Nothing compared is not `all equal`."""
    with pytest.raises(ValueError, match="no host folders"):
        golden.check(tmp_path)


def test_recorded_pixels_reproduce_the_slice_stage_of_every_host() -> None:
    """The slice stage needs no host: the recorded pixels of a case alone give its slices."""
    for case in CASES:
        tensors = load_file(case)
        if bool(tensors["slice_stage"]):
            slices = tensors["pixel_values"].float().view(len(tensors["slice_kept"]), -1)
            choice = keep_changed(slices, gamma=float(tensors["gamma"]))
            assert torch.equal(choice.kept, tensors["slice_kept"]), case
