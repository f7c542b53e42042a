"""Late instances, copies, mixed patients, and a PACS that is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.phantom_series import PhantomSeries
from tests.running import Pacs, Service, Storescp, Story, data_set_of, deliveries, kinds, send

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, random_model: Path, storescp: Storescp) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), random_model, pacs=[Pacs(storescp.port)]) as running:
        yield running


def test_a_late_instance_makes_a_second_report(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """The study is read again with all instances, and the second report names the first as its predecessor."""
    phantom = PhantomSeries(study=11)
    *early, late = phantom.write(tmp_path)

    send(service, *early)
    service.wait_for_end(phantom.study_uid)
    send(service, late)
    story = service.wait_for_end(phantom.study_uid, analyses=2)

    assert story["study"]["revision"] == 2
    assert [one["state"] for one in story["analyses"]] == ["done", "done"]
    assert [one["counts"]["slices_in_series"] for one in story["analyses"]] == [len(early), len(early) + 1]
    first, second = storescp.reports(phantom.study_uid)
    assert "PredecessorDocumentsSequence" not in first
    (named,) = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert named.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert second.SOPInstanceUID != first.SOPInstanceUID


def test_identical_instances_sent_again_change_nothing(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """Acknowledged and recorded; no revision, no analysis, no second copy in the spool."""
    phantom = PhantomSeries(study=12)
    phantom.write(tmp_path)
    send(service, tmp_path)
    service.wait_for_end(phantom.study_uid)

    send(service, tmp_path)
    story = service.wait_for(
        phantom.study_uid, lambda story: recorded_again(story) == phantom.slices, "every copy is recorded"
    )

    assert (story["study"]["revision"], story["study"]["state"]) == (1, "complete")
    assert len(story["analyses"]) == 1
    assert sum(one["instances"] for one in story["series"]) == phantom.slices
    assert len(storescp.reports(phantom.study_uid)) == 1


def recorded_again(story: Story) -> int:
    """How many instances came again with identical bytes."""
    return sum(event["detail"]["instances"] for event in story["events"] if event["kind"] == "instances-received-again")


def test_mixed_patients_are_refused(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """Two patients under one Study Instance UID are never read together: refused before any worker, no report."""
    one = PhantomSeries(study=13, patient_id="ONE", patient_name="One^Patient")
    other = PhantomSeries(study=13, series=2, patient_id="OTHER", patient_name="Other^Patient")
    one.write(tmp_path)
    other.write(tmp_path)

    send(service, tmp_path)
    story = service.wait_for_end(one.study_uid)

    assert story["study"]["patient_mismatch"] is True
    (analysis,) = story["analyses"]
    assert (analysis["state"], analysis["reason_code"]) == ("refused", "patient-mismatch")
    assert analysis["attempts"] == 0
    assert "patient-mismatch" in kinds(story)
    assert storescp.reports(one.study_uid) == []


def test_a_report_waits_for_a_pacs_that_is_away(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """It is delivered once the PACS is back: the bytes that were built, by a model that ran once."""
    phantom = PhantomSeries(study=14)
    phantom.write(tmp_path)
    storescp.stop()
    try:
        send(service, tmp_path)
        waiting = service.wait_for(
            phantom.study_uid, lambda story: any(one["attempts"] for one in deliveries(story)), "a failed attempt"
        )
    finally:
        storescp.start()
    story = service.wait_for_end(phantom.study_uid)

    assert [one["state"] for one in deliveries(waiting)] == ["pending"]
    assert all("cannot be reached" in one["reason"] for one in deliveries(waiting))
    (analysis,) = story["analyses"]
    (result,) = analysis["results"]
    assert (analysis["state"], analysis["attempts"]) == ("done", 1)
    assert result["sha256"] == waiting["analyses"][0]["results"][0]["sha256"]
    (delivery,) = result["deliveries"]
    assert delivery["state"] == "delivered"
    assert delivery["attempts"] > 1
    (report,) = storescp.reports(phantom.study_uid)
    (arrived,) = [path for path in storescp.files() if path == Path(str(report.filename))]
    assert data_set_of(arrived.read_bytes()) == data_set_of(service.outbox(result))
