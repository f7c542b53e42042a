"""The arithmetic of `./run bench accuracy`, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from service.shared.messages import FindingName
from service.shared.settings import PruningSettings
from tests.bench.accuracy import main, outcomes, paired, settings_of
from tests.bench.real_studies import compare, references, rouge_l
from tests.running import PROJECT
from workers.demo_model.anatomy import Side
from workers.demo_model.findings import Extent
from workers.demo_model.folder import MARK, new_model, write_folder
from workers.demo_model.labels import EffusionLabel, Labels

WET = Labels(effusion=EffusionLabel((Side.LEFT,), Extent.SMALL))
REAL = PROJECT / "tests" / "data" / "real-ct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("model")
    write_folder(new_model(0), made)
    return made


def test_the_grid_has_what_each_method_reads() -> None:
    """`off` once, medpruner over gamma and tau, guarded over budget and tau."""
    names = [one.name for one in settings_of(("off", "medpruner", "guarded"), (0.02, 0.05), (0.9,), (0.3, 0.5))]
    assert names == [
        "off",
        "medpruner gamma 0.02 tau 0.9",
        "medpruner gamma 0.05 tau 0.9",
        "guarded budget 0.3 tau 0.9",
        "guarded budget 0.5 tau 0.9",
    ]


def test_a_difference_is_of_the_same_studies() -> None:
    """Two of ten effusions lost: 20 points of sensitivity, none of precision, and the interval holds the truth."""
    before = outcomes([(WET, WET)] * 10 + [(Labels(), Labels())] * 10)["effusion"]
    after = outcomes([(WET, WET)] * 8 + [(WET, Labels())] * 2 + [(Labels(), Labels())] * 10)["effusion"]
    sensitivity, precision = paired(after, before)
    assert sensitivity.value == pytest.approx(-0.2)
    assert sensitivity.low < -0.2 < sensitivity.high <= 0
    assert (precision.value, precision.low, precision.high) == (0, 0, 0)


def test_no_difference_has_an_interval_of_nothing() -> None:
    """The same answers give exactly zero, not noise."""
    same = outcomes([(WET, WET)] * 5 + [(Labels(), WET)] * 2)["effusion"]
    assert all((one.low, one.high) == (0, 0) for one in paired(same, same))


def test_texts_are_compared_word_by_word() -> None:
    """Equal texts 1, nothing shared 0, half in order two thirds."""
    assert rouge_l("No pleural effusion.", "no pleural effusion.") == 1
    assert rouge_l("a b", "c d") == 0
    assert rouge_l("a b", "a x b x") == pytest.approx(2 / 3)


def test_an_unknown_finding_is_named(tmp_path: Path) -> None:
    """With the file, the study, and what is known."""
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"one": {"findings": {"nodul": True}}}))
    with pytest.raises(SystemExit, match=r"one: .*nodul.*nodule, effusion"):
        references(labels)


def test_phantoms_are_read_and_a_second_run_reads_none_again(folder: Path, tmp_path: Path) -> None:
    """Table and plot are written; every answer is kept, so that a stopped run goes on."""
    said: list[str] = []
    arguments = [
        "--model",
        str(folder),
        "--seeds",
        "3-4",
        "--methods",
        "off,guarded",
        "--record",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments, said.append) == 0
    stored = (tmp_path / "answers-slabs.jsonl").read_text()
    assert main(arguments, said.append) == 0
    assert (tmp_path / "answers-slabs.jsonl").read_text() == stored
    assert len(stored.splitlines()) == 4
    assert "| guarded budget 0.5 tau 0.9 | effusion |" in (tmp_path / "table.md").read_text()
    recorded = json.loads((folder / MARK).read_text())["measured"]
    assert recorded["on"].startswith("2 computed phantoms")
    assert set(recorded["sensitivity"]) == set(recorded["precision"]) >= {"effusion", "not supported"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_the_training_are_refused(folder: Path, tmp_path: Path) -> None:
    """Accuracy is of phantoms that the model never saw."""
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--seeds", "1000000000-1000000001", "--out", str(tmp_path)])


def test_real_studies_are_scored_by_closed_questions(folder: Path, tmp_path: Path) -> None:
    """A folder of studies with labels and a reference report gives rates, tokens, text score and time."""
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"head-philips": {"findings": {"nodule": False}, "report": "No lung nodule."}}))
    text = compare(folder, REAL, labels, [("off", PruningSettings(method="off"))], lambda _: None)
    assert "| off | 1 | 100.0% | 0." in text
    assert f"| off | {FindingName.NODULE} |" in text
