"""workers.demo_model.random_weights: the folder that stands in where no trained weights are."""

from __future__ import annotations

import json
from pathlib import Path

from workers.demo_model.random_weights import write
from workers.vlm.folder import weights_sha256


def test_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    """The weights follow from the seed, so that a report can be repeated on another machine."""
    for name, seed in (("first", 7), ("second", 7), ("other", 8)):
        write(tmp_path / name, seed)

    first, second, other = (weights_sha256(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first != other


def test_weights_are_marked_as_random(tmp_path: Path) -> None:
    """The folder itself says that its weights are random, wherever it is copied."""
    write(tmp_path, 0)

    assert json.loads((tmp_path / "medpruner.json").read_text())["weights"] == "random"


def test_folder_is_small_and_holds_safetensors_only(tmp_path: Path) -> None:
    """Under 1 MB, and no pickle."""
    write(tmp_path, 0)

    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".jinja", ".safetensors"}
