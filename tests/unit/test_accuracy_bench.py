"""The arithmetic of `./run bench accuracy`, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from service.shared.messages import FindingName
from service.shared.settings import PruningSettings
from tests.bench import accuracy
from tests.bench.accuracy import Answers, main, outcomes, paired, settings_of, tasks_of
from tests.bench.accuracy_record import CARD, limitations, measured, with_tables
from tests.bench.real_studies import compare, references, rouge_l
from tests.running import PROJECT
from workers.demo_model.accuracy import Rate, accuracy_of
from workers.demo_model.anatomy import Side
from workers.demo_model.assemble import WEIGHTS
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


def test_what_was_never_named_has_no_precision_to_compare() -> None:
    """A word instead of a number that is none."""
    never = outcomes([(WET, Labels())] * 3)["effusion"]
    sensitivity, precision = paired(never, never)
    assert str(sensitivity) == "+0.0 (+0.0 to +0.0)"
    assert str(precision) == "none named"
    assert str(Rate(0, 0)) == "none (0/0)"


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
    """Table and plot are written; every answer is kept, so that a stopped run goes on where it was torn off."""
    said: list[str] = []
    (folder / CARD).write_text((WEIGHTS / CARD).read_text())
    arguments = ["--model", str(folder), "--seeds", "3-4", "--methods", "off,guarded", "--record"]
    arguments += ["--processes", "1", "--out", str(tmp_path)]
    answers = tmp_path / "answers-slabs.jsonl"
    assert main(arguments, said.append) == 0
    stored = answers.read_text()
    answers.write_text(stored[:-40])
    assert main(arguments, said.append) == 0
    assert [json.loads(line)["text"] for line in answers.read_text().splitlines()] == [
        json.loads(line)["text"] for line in stored.splitlines()
    ]
    assert len(stored.splitlines()) == 4
    assert "1 of 1 studies" in "".join(said)
    assert "| guarded budget 0.5 tau 0.9 | effusion |" in (tmp_path / "table.md").read_text()
    recorded = json.loads((folder / MARK).read_text())
    assert recorded["measured"]["on"].startswith("2 computed phantoms")
    assert set(recorded["measured"]["sensitivity"]) == set(recorded["measured"]["precision"])
    assert "On 2 computed phantoms" in recorded["limitations"][0]
    assert "--seeds 3-4 --methods off,guarded --record`" in (folder / CARD).read_text()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_several_processes_give_the_answers_of_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which process read a study does not show in what was said."""
    monkeypatch.setattr(accuracy, "TOGETHER", 1)
    said = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        arguments = ["--model", str(folder), "--seeds", "3-4", "--methods", "off", "--processes", processes]
        assert main([*arguments, "--out", str(out)], lambda _: None) == 0
        stored = [json.loads(line) for line in (out / "answers-slabs.jsonl").read_text().splitlines()]
        said.append({one["seed"]: one["text"] for one in stored})
    assert said[0] == said[1]
    assert sorted(said[0]) == [3, 4]


def test_only_settings_that_lack_an_answer_are_read(tmp_path: Path) -> None:
    """A method added later reads the studies again for itself alone."""
    answers = Answers(tmp_path / "answers.jsonl", "model")
    both = settings_of(("off", "guarded"), (), (0.9,), (0.5,))
    answers.known = dict.fromkeys([(seed, "off") for seed in range(10)])  # type: ignore[assignment]

    tasks = tasks_of(range(12), both, "slabs", answers)

    assert [(task.seeds, [one.name for one in task.settings]) for task in tasks] == [
        (tuple(range(8)), ["guarded budget 0.5 tau 0.9"]),
        ((8, 9), ["guarded budget 0.5 tau 0.9"]),
        ((10, 11), ["off", "guarded budget 0.5 tau 0.9"]),
    ]


def test_answers_of_other_weights_are_never_mixed_in(folder: Path, tmp_path: Path) -> None:
    """The run stops and names the file."""
    (tmp_path / "answers-slabs.jsonl").write_text('{"model": "another"}\n')
    with pytest.raises(SystemExit, match=r"answers-slabs\.jsonl holds answers of another model"):
        main(["--model", str(folder), "--seeds", "3-4", "--out", str(tmp_path)], lambda _: None)


def test_the_card_keeps_what_was_not_measured() -> None:
    """Only the part on accuracy is written anew; a card without one is refused rather than guessed at."""
    card = "# Card\n\n## Accuracy on held-out phantoms\n\nold\n\n## Known faults\n\nMany.\n"
    written = with_tables(card, "| a |", "./run it")
    assert "old" not in written
    assert "./run it" in written
    assert written.endswith("| a |\n\n## Known faults\n\nMany.\n")
    with pytest.raises(SystemExit, match="no heading"):
        with_tables("# Card\n", "| a |", "./run it")


def test_limitations_say_what_was_missed() -> None:
    """Numbers with intervals; what was never there to be found has no number."""
    found = accuracy_of([(WET, WET)] * 3 + [(WET, Labels())])
    first, second, third = limitations(found)
    assert "an unknown share of nodules of 8 mm and more (none shown), and it named none." in first
    assert "75 % (95 % interval 30-95 %) of pleural effusions" in second
    assert "calcifications, and it named none; it has never been measured on a patient." in third
    recorded = measured(found, range(4))
    assert recorded["sensitivity"]["effusion"] == [0.75, 0.301, 0.954]
    assert recorded["precision"]["aortic calcification"] is None
    assert "NaN" not in json.dumps(recorded)


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
