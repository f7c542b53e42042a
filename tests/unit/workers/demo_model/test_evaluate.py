"""A folder made by training is read by the product's own host."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from service.shared.messages import FindingName
from service.shared.settings import ModelSettings, PruningMethod, PruningSettings
from workers.demo_model.assemble import assemble
from workers.demo_model.channels import THIRD_CHANNEL
from workers.demo_model.evaluate import look, read_together, study_of
from workers.demo_model.folder import MARK, new_model, write_folder
from workers.demo_model.other_bodies import Body
from workers.demo_model.phantom import SLABS, Modality, Protocol, generate, labels_at
from workers.demo_model.pool import images_of
from workers.vlm import Reading, open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with untrained weights."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("model")
    write_folder(new_model(0), made)
    return made


def test_reading_together_says_what_the_host_says_alone(folder: Path) -> None:
    """Shared tower and batches change nothing: text, slices and tokens are those of `Host.read`, by every method."""
    host = open_model(ModelSettings(threads=1), folder)
    studies = [study_of(seed, SLABS) for seed in (3, 4)]
    seen = [look(host, study) for study in studies]
    for method in PruningMethod:
        pruning = PruningSettings(method=method, token_budget=0.3)
        together = read_together(host, seen, "Describe this CT study.", pruning, max_new_tokens=12)
        for study, reading in zip(studies, together, strict=True):
            alone = host.read(
                Reading(study.images, "Describe this CT study.", pruning, max_new_tokens=12, guide=study.guide)
            )
            assert reading.text == alone.text
            assert reading.tokens_kept == alone.counts.tokens_kept
            assert reading.slices_kept == alone.inputs_kept.sum()


def test_labels_need_no_rendering() -> None:
    """The truth about a seed is that of the phantom drawn from it."""
    for seed in range(12):
        assert labels_at(seed) == study_of(seed, Protocol(24, slices=4)).labels


def test_folder_is_small_and_says_what_it_is(folder: Path) -> None:
    """20 MB at most, marked as demonstration weights, with the input it wants."""
    mark = json.loads((folder / MARK).read_text())

    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    assert mark["weights"] == "demonstration"
    assert mark["preprocessing"]["third_channel"] == THIRD_CHANNEL
    assert mark["coded_findings"] == list(FindingName)


def test_assembled_weights_are_the_trained_ones(tmp_path: Path) -> None:
    """What decoder.pt holds is what the folder holds, in bfloat16."""
    model = new_model(1)
    torch.save({"model": model.state_dict()}, tmp_path / "decoder.pt")

    assemble(tmp_path, tmp_path / "made")

    loaded = type(model).from_pretrained(tmp_path / "made", dtype=torch.float32)
    name, weight = next((n, w) for n, w in loaded.named_parameters() if n.endswith("q_proj.weight"))
    assert torch.equal(weight, dict(model.named_parameters())[name].bfloat16().float())


def test_mean_of_two_trainings_is_assembled(folder: Path, tmp_path: Path) -> None:
    """Half of what was trained, half of what it began with."""
    model = new_model(1)
    torch.save({"model": model.state_dict()}, tmp_path / "decoder.pt")

    assemble(tmp_path, tmp_path / "made", mean_with=folder)

    before, after, mean = (
        next(weight for name, weight in one.named_parameters() if name.endswith("q_proj.weight"))
        for one in (
            type(model).from_pretrained(folder, dtype=torch.float32),
            model.bfloat16().float(),
            type(model).from_pretrained(tmp_path / "made", dtype=torch.float32),
        )
    )
    assert not torch.equal(before, after)
    assert torch.equal(mean, ((before + after) / 2).bfloat16().float())


def test_slab_protocol_needs_no_resampling() -> None:
    """A phantom rendered as halves of slabs goes in as it is, two and two."""
    phantom = generate(1, SLABS)
    slabs = phantom.values.reshape(24, 2, 120, 120).mean(axis=1, dtype=np.float32)

    assert (images_of(phantom)[..., 0] == np.rint(np.clip((slabs + 1024) * (255 / 2048), 0, 255))).all()


def test_magnetic_resonance_is_scaled_by_percentiles() -> None:
    """No window of HU for MR."""
    images = images_of(generate(1, Protocol(60, slices=8), body=Body.HEAD, modality=Modality.MR))

    assert (images[..., 0] == images[..., 1]).all()
