"""The worker and the report have one answer to what an analysis reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Analysis
from service.shared.inputs import inputs_of
from tests.rows import add_analysis, add_instance, add_study, after, open_database


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


def read_paths(sessions: sessionmaker[Session], analysis_id: int) -> list[str]:
    with sessions() as session:
        return [one.path for one in inputs_of(session, session.get_one(Analysis, analysis_id))]


def test_last_content_under_a_uid_is_read_also_from_another_series(sessions: sessionmaker[Session]) -> None:
    """A corrected instance replaces the first one wherever it was moved to."""
    study_id = add_study(sessions)
    first = {"sop_instance_uid": "2.25.7", "series_uid": "2.25.1", "sha256": "a" * 64, "path": "first"}
    corrected = first | {"series_uid": "2.25.2", "sha256": "b" * 64, "path": "corrected", "received_at": after(5)}
    add_instance(sessions, study_id, 1, **first)
    add_instance(sessions, study_id, 2, **corrected)
    analysis_id = add_analysis(sessions, study_id)

    assert read_paths(sessions, analysis_id) == ["corrected"]


def test_later_revisions_and_other_objects_are_left_out(sessions: sessionmaker[Session]) -> None:
    """An analysis reads the images of its own revision, whatever came since."""
    study_id = add_study(sessions)
    add_instance(sessions, study_id, 1, path="image")
    add_instance(sessions, study_id, 2, path="report", is_image=False)
    add_instance(sessions, study_id, 3, path="late", revision=2)
    analysis_id = add_analysis(sessions, study_id)

    assert read_paths(sessions, analysis_id) == ["image"]
