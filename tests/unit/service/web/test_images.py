"""What the retention viewer is given: real pixels and the map of kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydicom import dcmread
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Role
from tests.report_samples import ANSWERS
from tests.rows import kinds, open_database
from tests.web_study import RealStudy, add_real_study
from tests.web_visits import add_user, settings_in, sign_in, visit


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        add_user(opened, "vera", Role.VIEWER)
        yield opened


@pytest.fixture
def study(sessions: sessionmaker[Session], tmp_path: Path, head_ct: Path) -> RealStudy:
    return add_real_study(sessions, settings_in(tmp_path), head_ct)


@pytest.fixture
def client(sessions: sessionmaker[Session], tmp_path: Path) -> TestClient:
    visitor = visit(sessions, tmp_path)
    sign_in(visitor, "vera")
    return visitor


def test_frame_is_the_slice_in_hounsfield_units(client: TestClient, study: RealStudy) -> None:
    """Little-endian int16, as slope and intercept make them of the stored values."""
    answer = client.get(f"/api/v1/analyses/{study.analysis_id}/frames/3")
    source = dcmread(study.source.instances[3].path)
    shape = int(answer.headers["x-rows"]), int(answer.headers["x-columns"])
    hu = np.frombuffer(answer.content, "<i2").reshape(shape)

    assert np.array_equal(hu, source.pixel_array * source.RescaleSlope + source.RescaleIntercept)


def test_retention_tells_what_was_shown(client: TestClient, study: RealStudy) -> None:
    """Every slice with its state, every input with one digit per token."""
    told = client.get(f"/api/v1/analyses/{study.analysis_id}/retention").json()

    assert [one["state"] for one in told["sources"][:3]] == ["shown", "represented", "shown"]
    assert told["inputs"][0]["tokens"] == "02" * 8
    assert told["inputs"][1]["tokens"] == "3" * 16


def test_slice_that_cannot_be_decoded_is_a_sentence(client: TestClient, study: RealStudy, tmp_path: Path) -> None:
    """Damaged or removed: 404 with the reason, and nothing of the file's content."""
    first, second = sorted((tmp_path / "spool" / "studies" / "real").glob("*.dcm"))[:2]
    first.write_bytes(first.read_bytes()[:2000])
    second.unlink()
    damaged = client.get(f"/api/v1/analyses/{study.analysis_id}/frames/0")
    removed = client.get(f"/api/v1/analyses/{study.analysis_id}/frames/1")

    assert (damaged.status_code, removed.status_code) == (404, 404)
    assert damaged.json()["detail"].startswith("the image cannot be decoded here (")
    assert removed.json()["detail"] == "the image has been removed from the spool"
    assert client.get(f"/api/v1/analyses/{study.analysis_id}/frames/999").status_code == 404


def test_altered_output_is_not_shown(client: TestClient, study: RealStudy, tmp_path: Path) -> None:
    """A map that is not the recorded one would show what never was."""
    path = next((tmp_path / "outputs").rglob("*.json"))
    path.write_bytes(path.read_bytes() + b" ")
    answer = client.get(f"/api/v1/analyses/{study.analysis_id}/retention")

    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "the stored output does not match its recorded digest",
    )


def test_report_reads_as_text_and_as_json(client: TestClient, study: RealStudy) -> None:
    """The Structured Report as it is sent, for people and for programs."""
    text = client.get("/api/v1/results/1/text")
    content = client.get("/api/v1/results/1/content")

    assert "The lungs are clear." in text.text
    assert text.headers["content-type"].startswith("text/plain")
    assert content.json()["00080060"]["Value"] == ["SR"]


def test_map_is_a_picture_of_the_slice(client: TestClient, study: RealStudy) -> None:
    """As the Secondary Capture draws it: orange around a slice that was not given; a window moves the greys."""
    address = f"/api/v1/analyses/{study.analysis_id}/maps"
    given, left_out, bone = (client.get(f"{address}/{what}") for what in ("0", "1", "0?centre=400&width=1800"))
    pictures = [np.asarray(Image.open(BytesIO(one.content))) for one in (given, left_out, bone)]
    source = dcmread(study.source.instances[0].path)

    assert given.headers["content-type"] == "image/png"
    assert pictures[0].shape == (source.Rows, source.Columns, 3)
    assert tuple(pictures[1][100, 0]) == (255, 140, 0)
    assert tuple(pictures[0][100, 0]) != (255, 140, 0)
    assert not np.array_equal(pictures[0], pictures[2])
    assert client.get(f"{address}/999").status_code == 404


def test_one_look_is_one_view(sessions: sessionmaker[Session], client: TestClient, study: RealStudy) -> None:
    """Hundreds of slices of one look are one line of the audit; without a page before them they are one too."""
    for path in ("retention", "frames/0", "frames/1", "maps/2", "answers"):
        assert client.get(f"/api/v1/analyses/{study.analysis_id}/{path}").status_code == 200

    assert kinds(sessions, actor="web/vera").count("study-viewed") == 1


def test_answers_to_closed_questions_are_shown(client: TestClient, study: RealStudy) -> None:
    """Each with its probability, on the page and in the API; the first is about the study, and about no finding."""
    page = client.get(f"/studies/{study.study_id}").text
    items = client.get(f"/api/v1/analyses/{study.analysis_id}/answers").json()["items"]

    assert [(one["finding"], one["chosen"]) for one in items[:2]] == [(None, "yes"), ("nodule", "yes")]
    assert len(items) == len(ANSWERS)
    for cell in (">the study<", ">nodule<", ">chest ct<", ">99 %<", ">93 %<"):
        assert cell in page
