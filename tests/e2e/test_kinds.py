"""What becomes of different studies: CT, MR, one that cannot be read, one that nobody routes; and names in Japanese."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.phantom_series import PhantomSeries
from tests.running import Pacs, Service, Storescp, kinds, send

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUTE = """
[[route]]
name = "phantoms"
match = { StudyDescription = "Synthetic*" }
"""

# PS3.5 H.3.1, with its Specific Character Set
JAPANESE_NAME = "Yamada^Tarou=山田^太郎=やまだ^たろう"
JAPANESE_CHARSET = r"\ISO 2022 IR 87"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, random_model: Path, storescp: Storescp) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with Service(folder, random_model, pacs=[Pacs(storescp.port)], more=ROUTE) as running:
        yield running


@pytest.mark.parametrize(("study", "modality"), [(1, "CT"), (2, "MR")])
def test_a_ct_and_an_mr_are_reported(
    service: Service, storescp: Storescp, tmp_path: Path, study: int, modality: str
) -> None:
    """Each ends as done with one delivered report, and `show` says why this series was chosen."""
    phantom = PhantomSeries(study=study, modality=modality)
    phantom.write(tmp_path)

    send(service, tmp_path)
    service.wait_for_end(phantom.study_uid)

    (analysis,) = service.show(phantom.study_uid)["analyses"]
    assert (analysis["state"], analysis["attempts"]) == ("done", 1), analysis["reason"]
    assert analysis["series_uid"] == phantom.series_uid
    assert analysis["series_reason"]
    assert analysis["counts"]["slices_in_series"] == phantom.slices
    assert [one["state"] for one in analysis["results"][0]["deliveries"]] == ["delivered"]
    (report,) = storescp.reports(phantom.study_uid)
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert len(evidence.ReferencedSOPSequence) == phantom.slices


def test_a_lone_localizer_is_refused(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """A study that cannot be read ends as refused after one attempt, with the reason in `show` and no report."""
    phantom = PhantomSeries(study=3, slices=1, localizer=True)
    phantom.write(tmp_path)

    send(service, tmp_path)
    service.wait_for_end(phantom.study_uid)

    story = service.show(phantom.study_uid)
    (analysis,) = story["analyses"]
    assert (analysis["state"], analysis["attempts"]) == ("refused", 1)
    assert analysis["reason_code"] == "no-suitable-series"
    assert "localizer" in analysis["reason"].lower()
    assert "analysis-refused" in kinds(story)
    assert storescp.reports(phantom.study_uid) == []


def test_a_study_that_no_route_takes_is_on_record(service: Service, tmp_path: Path) -> None:
    """It is kept and complete, nothing runs, and its history says that it is unrouted."""
    phantom = PhantomSeries(study=4, study_description="Something else")
    phantom.write(tmp_path)

    send(service, tmp_path)
    service.wait_for(phantom.study_uid, lambda story: "study-unrouted" in kinds(story), "the study is unrouted")

    story = service.show(phantom.study_uid)
    assert story["study"]["state"] == "complete"
    assert story["analyses"] == []
    assert sum(one["instances"] for one in story["series"]) == phantom.slices


def test_a_japanese_name_arrives_intact(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """A name in ISO 2022 IR 87 stands in the delivered report in all three groups, in UTF-8."""
    phantom = PhantomSeries(study=5, patient_name=JAPANESE_NAME, charset=JAPANESE_CHARSET)
    written = phantom.write(tmp_path)
    assert b"\x1b$B;3ED\x1b(B^" in written[0].read_bytes()  # the bytes of PS3.5 H.3.1, not UTF-8

    send(service, tmp_path)
    service.wait_for_end(phantom.study_uid)

    (report,) = storescp.reports(phantom.study_uid)
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert str(report.PatientName) == JAPANESE_NAME
    assert report.PatientName.ideographic == "山田^太郎"
    assert report.PatientName.phonetic == "やまだ^たろう"
    assert any(JAPANESE_NAME.encode() in path.read_bytes() for path in storescp.files())
    assert service.show(phantom.study_uid)["header"]["patient_name"] == JAPANESE_NAME
