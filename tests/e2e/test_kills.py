"""kill -9 of everything that runs, in mid-work: each time one report reaches the PACS, without anybody's help."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import func, select

from service import dispatch
from service.shared.db import Analysis, Study
from service.shared.settings import spool_folder
from tests.phantom_series import PhantomSeries
from tests.running import PATIENCE_S, Pacs, Service, Storescp, Story, deliveries, kinds, send
from tests.servers import wait_for

pytestmark = [pytest.mark.kills, pytest.mark.slow, pytest.mark.timeout(300)]

LONG_LEASE_S = 3600.0  # so that nothing is read again because time went by: the deaths themselves must be seen
LONG_REPORT = 800  # tokens: the model writes for seconds on a quick machine too, so that a kill can hit it


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, random_model: Path, storescp: Storescp) -> Iterator[Service]:
    """One service for all tests of this file: what was killed in one test must serve the next one."""
    folder = tmp_path_factory.mktemp("service")
    pacs = [Pacs(storescp.port)]
    with Service(folder, random_model, pacs=pacs, max_new_tokens=LONG_REPORT, lease_s=LONG_LEASE_S) as running:
        running.wait_for_model()
        yield running


def is_running(story: Story) -> bool:
    return [one["state"] for one in story["analyses"]] == ["running"]


def sent_phantom(service: Service, folder: Path, study: int) -> str:
    """Send a study of its own; its UID, once every instance was answered with Success."""
    phantom = PhantomSeries(study=study)
    send(service, *phantom.write(folder / str(study)))
    return phantom.study_uid


def assert_one_report(service: Service, storescp: Storescp, study_uid: str, *, attempts: int = 1) -> None:
    """The way was gone to its end once, and the PACS holds one distinct report."""
    story = service.wait_for_end(study_uid)
    (analysis,) = story["analyses"]
    assert (analysis["state"], analysis["attempts"]) == ("done", attempts), analysis["reason"]
    assert story["study"]["revision"] == 1
    assert kinds(story).count("analysis-read") == 1
    assert len(storescp.report_uids(study_uid)) == 1


def test_the_worker_child_dies_while_it_reads(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """A new child reads the study again."""
    study_uid = sent_phantom(service, tmp_path, 31)
    service.wait_for(study_uid, is_running, "the analysis runs")

    os.kill(service.worker_child(), signal.SIGKILL)

    assert is_running(service.story(study_uid))  # so it was hit in the middle
    assert_one_report(service, storescp, study_uid, attempts=2)


def test_the_worker_dies_while_it_reads(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """Its child goes with it, and a new worker reads the study again."""
    study_uid = sent_phantom(service, tmp_path, 32)
    service.wait_for(study_uid, is_running, "the analysis runs")
    child = service.worker_child()

    service.kill_process("worker")

    wait_for(lambda: child not in service.processes(), "the child is gone")
    assert is_running(service.story(study_uid))
    assert_one_report(service, storescp, study_uid, attempts=2)


def test_redis_dies_while_studies_wait_and_run(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """The one that runs is finished and not run again, the one that waits is read."""
    runs, waits = (sent_phantom(service, tmp_path, study) for study in (33, 34))
    wait_for_one_running_one_queued(service, runs, waits)

    service.kill_process("redis")

    assert_one_report(service, storescp, runs)
    assert_one_report(service, storescp, waits)


def test_redis_forgets_everything(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """FLUSHALL takes the message of a queued analysis away; it is rung for again."""
    runs, waits = (sent_phantom(service, tmp_path, study) for study in (35, 36))
    wait_for_one_running_one_queued(service, runs, waits)

    with service.redis() as client:
        assert client.flushall()

    assert_one_report(service, storescp, runs)
    assert_one_report(service, storescp, waits)


def wait_for_one_running_one_queued(service: Service, one: str, other: str) -> None:
    """Whichever was first."""

    def states() -> list[str]:
        found = [service.story(uid).get("analyses", []) for uid in (one, other)]
        return sorted(analysis["state"] for analyses in found for analysis in analyses)

    wait_for(lambda: states() == ["queued", "running"], "one analysis runs, one waits", PATIENCE_S)


@pytest.mark.parametrize(("name", "study"), [("receive", 37), ("ingest", 38), ("dispatch", 39)])
def test_a_role_dies_after_the_last_success(
    service: Service, storescp: Storescp, tmp_path: Path, name: str, study: int
) -> None:
    """What was acknowledged is read and reported, whichever part was killed after the acknowledgement."""
    study_uid = sent_phantom(service, tmp_path, study)

    service.kill_process(name)

    assert_one_report(service, storescp, study_uid)


def test_deliver_dies_while_a_report_waits(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """The new process sends what the old one could not; nothing is built again."""
    storescp.stop()
    try:
        study_uid = sent_phantom(service, tmp_path, 40)
        waiting = service.wait_for(
            study_uid, lambda story: any(one["attempts"] for one in deliveries(story)), "a failed attempt"
        )
        service.kill_process("deliver")
    finally:
        storescp.start()

    assert_one_report(service, storescp, study_uid)
    after = service.story(study_uid)
    assert after["analyses"][0]["results"][0]["sha256"] == waiting["analyses"][0]["results"][0]["sha256"]


def test_the_service_dies_between_success_and_dispatch(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """Its processes die with it; started again, it reads what was acknowledged."""
    study_uid = sent_phantom(service, tmp_path, 41)

    service.kill()

    wait_for(lambda: service.processes() == [], "every process died with the supervisor")
    assert service.story(study_uid).get("analyses", []) == []
    service.start()
    assert_one_report(service, storescp, study_uid)


def test_the_service_dies_while_it_reads(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """Started again, it reads the study once more; no process of the first life is left that could interfere."""
    study_uid = sent_phantom(service, tmp_path, 42)
    service.wait_for(study_uid, is_running, "the analysis runs")

    service.kill()

    wait_for(lambda: service.processes() == [], "every process died with the supervisor")
    assert is_running(service.story(study_uid))
    service.start()
    assert_one_report(service, storescp, study_uid, attempts=2)


def test_one_message_delivered_three_times_in_parallel(service: Service, storescp: Storescp, tmp_path: Path) -> None:
    """Three workers get the same id at the same time: one reads, two find nothing to claim."""
    service.start_worker()
    service.start_worker()
    dispatcher = service.process("dispatch")
    os.kill(dispatcher, signal.SIGSTOP)
    try:
        study_uid = sent_phantom(service, tmp_path, 43)
        story = service.wait_for(study_uid, lambda story: "study-complete" in kinds(story), "the study is complete")
        with service.sessions.begin() as session:
            spool = spool_folder(service.settings)
            dispatch.queue_study(session, story["study"]["id"], service.settings, spool, datetime.now(UTC))
        (queued,) = service.story(study_uid)["analyses"]
        doorbell = dispatch.Doorbell(service.settings)
        assert doorbell.ring([queued["id"]] * 3) == [queued["id"]] * 3
        doorbell.close()
        nothing = re.compile(rf"nothing_to_claim +analysis_id={queued['id']}\b")
        wait_for(lambda: len(nothing.findall(service.log_text())) == 2, "two find nothing to claim", PATIENCE_S)
    finally:
        os.kill(dispatcher, signal.SIGCONT)

    assert_one_report(service, storescp, study_uid)
    assert kinds(service.story(study_uid)).count("analysis-started") == 1


def test_no_second_report_came_later(service: Service, storescp: Storescp) -> None:
    """After all these deaths every study at the PACS has one distinct report, whatever was still on its way."""
    with service.sessions() as session:
        study_uids = list(session.scalars(select(Study.study_uid)))
        analyses = session.scalar(select(func.count()).select_from(Analysis))

    assert {uid: len(storescp.report_uids(uid)) for uid in study_uids} == dict.fromkeys(study_uids, 1)
    assert analyses == len(study_uids)
