"""A report is run again from what was stored: same, or named where it differs. A tiny model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Analysis, AnalysisState
from service.shared.settings import Settings
from tests.phantom_series import PhantomSeries
from tests.rows import add_analysis, add_instance, add_study, finish, get, open_database, result
from workers import tasks
from workers.app import Child
from workers.demo_model import random_weights
from workers.reproduce import CannotReproduce, data_set_sha256, reproduce

RESULT_UID = "2.25.4000.1.1"


class Read:
    """A study that was read by the worker's own code, with a result on record."""

    def __init__(self, folder: Path, sessions: sessionmaker[Session], model: Path) -> None:
        self.sessions = sessions
        series = PhantomSeries(study=31)
        self.settings = Settings.model_validate(
            {
                "data": {"path": folder / "data"},
                "model": {"path": str(model), "threads": 1, "max_new_tokens": 6},
                "pruning": {"method": "medpruner"},
            }
        )
        spool = folder / "data" / "spool"
        spool.mkdir(parents=True)
        self.files = series.write(spool)
        study_id = add_study(sessions, series.study_uid)
        for number, path in enumerate(self.files):
            add_instance(
                sessions,
                study_id,
                number,
                series_uid=series.series_uid,
                sop_instance_uid=series.instance_uid(number),
                path=str(path.relative_to(spool)),
                sha256=data_set_sha256(path),
            )
        recorded = self.settings.model_dump(mode="json", include={"model", "pruning", "series"})
        self.analysis_id = add_analysis(sessions, study_id, settings=recorded)
        self.child = Child(self.settings, sessions, "host/1")
        tasks.read_study(self.analysis_id, self.child)
        assert get(sessions, Analysis, self.analysis_id).state is AnalysisState.READ
        assert finish(sessions, self.analysis_id, (result(self.analysis_id, sop_instance_uid=RESULT_UID), []))

    def again(self) -> dict[str, str]:
        """The parts that differ."""
        lines = reproduce(self.settings, self.sessions, RESULT_UID, self.child.model)
        assert len(lines) > 15
        return {line.part: line.difference for line in lines if line.difference is not None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_weights.write(folder, 7)
    return folder


@pytest.fixture
def read(tmp_path: Path, sqlite_url: str, model: Path) -> Iterator[Read]:
    with open_database(sqlite_url) as sessions:
        yield Read(tmp_path, sessions, model)


def test_stored_input_and_settings_give_the_same_again(read: Read) -> None:
    """Text, counts, masks and digests, whatever the configuration says by now."""
    read.settings = read.settings.model_copy(
        update={"pruning": read.settings.pruning.model_copy(update={"tau": 0.5, "gamma": 0.5})}
    )

    assert read.again() == {}


def test_changed_settings_are_named_with_what_they_changed(read: Read) -> None:
    """As if the record of the settings were not what had been applied."""
    with read.sessions.begin() as session:
        changed = get(read.sessions, Analysis, read.analysis_id).settings
        changed["pruning"] |= {"method": "off"}
        session.execute(update(Analysis).values(settings=changed))

    differing = read.again()

    assert "method: medpruner was recorded, now off" in differing["pruning"]
    assert "tokens_kept" in differing["counts"]
    assert "values differ" in differing["tokens"]
    assert "arrays_sha256" in differing
    assert "input" not in differing


def test_changed_input_is_named(read: Read) -> None:
    """One instance with other pixels than were received."""
    content = bytearray(read.files[3].read_bytes())
    content[-4000:] = bytes(4000)
    read.files[3].write_bytes(content)

    assert read.again()["input"] == f"1 of {len(read.files)} instances have other bytes than were received"


def test_input_that_was_removed_cannot_be_run_again(read: Read) -> None:
    """A part of a study is not read in its place; the reason says what to do."""
    read.files[0].unlink()

    with pytest.raises(CannotReproduce, match=f"1 of {len(read.files)} images were removed by age"):
        read.again()


def test_output_that_was_removed_or_altered_is_no_comparison(read: Read) -> None:
    """Neither silence nor a false difference."""
    output = next((read.settings.data.path / "outputs").rglob("*.json"))
    output.write_bytes(output.read_bytes() + b" ")
    with pytest.raises(CannotReproduce, match="does not match its recorded SHA-256"):
        read.again()

    output.unlink()
    with pytest.raises(CannotReproduce, match="keep_days"):
        read.again()


def test_unknown_report_is_named(read: Read) -> None:
    """With where its UID is to be found."""
    with pytest.raises(CannotReproduce, match=r"2\.25\.9.*`show`"):
        reproduce(read.settings, read.sessions, "2.25.9")
