"""A folder made by training is read by the product's own host."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.demo_model.assemble import assemble
from workers.demo_model.evaluate import images_of, main
from workers.demo_model.folder import MARK, new_model, write_folder
from workers.demo_model.other_bodies import Body
from workers.demo_model.phantom import SLABS, Modality, Protocol, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with untrained weights."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("model")
    write_folder(new_model(0), made)
    return made


def test_host_reads_phantoms_with_the_folder(folder: Path, tmp_path: Path) -> None:
    """One line per study, and the table of accuracy; untrained weights are wrong, not broken."""
    said: list[str] = []

    main(["--model", str(folder), "--seeds", "3-3", "--out", str(tmp_path / "out.jsonl")], said.append)

    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["tokens_in"] == json.loads(line)["tokens_kept"] == 24 * 36
    assert "| effusion |" in said[-1]


def test_seeds_of_the_training_are_refused(folder: Path) -> None:
    """Accuracy is of phantoms that the model never saw."""
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--seeds", "1000000000-1000000001"])


def test_folder_is_small_and_says_what_it_is(folder: Path) -> None:
    """20 MB at most, marked as demonstration weights, with the input it wants."""
    mark = json.loads((folder / MARK).read_text())

    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    assert mark["weights"] == "demonstration"
    assert mark["preprocessing"]["third_channel"] == "blobs"


def test_assembled_weights_are_the_trained_ones(tmp_path: Path) -> None:
    """What decoder.pt holds is what the folder holds, in bfloat16."""
    model = new_model(1)
    torch.save({"model": model.state_dict()}, tmp_path / "decoder.pt")

    assemble(tmp_path, tmp_path / "made")

    loaded = type(model).from_pretrained(tmp_path / "made", dtype=torch.float32)
    name, weight = next((n, w) for n, w in loaded.named_parameters() if n.endswith("q_proj.weight"))
    assert torch.equal(weight, dict(model.named_parameters())[name].bfloat16().float())


def test_slab_protocol_needs_no_resampling() -> None:
    """A phantom rendered as slabs goes in as it is."""
    phantom = generate(1, SLABS)

    assert (images_of(phantom)[..., 0] == np.rint(np.clip((phantom.values + 1024) / 2048 * 255, 0, 255))).all()


def test_magnetic_resonance_is_scaled_by_percentiles() -> None:
    """No window of HU for MR."""
    images = images_of(generate(1, Protocol(60, slices=8), body=Body.HEAD, modality=Modality.MR))

    assert (images[..., 0] == images[..., 1]).all()
