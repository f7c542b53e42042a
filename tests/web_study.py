"""A real CT with an analysis, its results and a delivery, as the steps of the way leave them; no model runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from service import results
from service.report.source import SourceStudy, read_source
from service.shared import delivery_transitions, transitions
from service.shared.db import Analysis, Delivery, StudyHeader
from service.shared.messages import store_output
from service.shared.settings import Settings, spool_folder
from tests.report_samples import ANSWERS, arrays_of, output_for
from tests.rows import ACTOR, NOW, add_analysis, add_instance, add_study, claimed, deliveries

ACCESSION = "ACC-4711"


@dataclass(frozen=True)
class RealStudy:
    study_id: int
    analysis_id: int
    source: SourceStudy


def add_real_study(sessions: sessionmaker[Session], settings: Settings, ct: Path) -> RealStudy:
    """The series in `ct`, read with every second slice and token kept; its report is delivered to every destination."""
    source = read_source(sorted(ct.glob("*.dcm")))
    study_id = add_study(sessions, source.study_uid)
    folder = spool_folder(settings) / "studies" / "real"
    folder.mkdir(parents=True)
    for number, one in enumerate(source.instances):
        path = folder / f"{number:03d}.dcm"
        shutil.copy(one.path, path)
        add_instance(
            sessions,
            study_id,
            number,
            series_uid=one.series_uid,
            sop_instance_uid=one.sop_instance_uid,
            path=str(path.relative_to(spool_folder(settings))),
        )
    with sessions.begin() as session:
        session.add(
            StudyHeader(
                study_id=study_id,
                salt="00",
                patient_id="PID-1",
                issuer_of_patient_id="",
                patient_name="DOE^JANE",
                patient_birth_date="19700101",
                patient_sex="F",
                accession_number=ACCESSION,
                study_date="20260301",
                study_description="Head",
            )
        )
    analysis_id = add_analysis(sessions, study_id)
    _read(sessions, settings, analysis_id, source)
    results.build(settings, sessions, analysis_id)
    for delivery_id in deliveries(sessions, analysis_id):
        with sessions.begin() as session:
            delivery = session.get_one(Delivery, delivery_id)
            delivery_transitions.close_delivered(
                session, delivery, status=0, note=None, now=NOW + timedelta(seconds=9), actor=ACTOR
            )
    return RealStudy(study_id, analysis_id, source)


def _read(sessions: sessionmaker[Session], settings: Settings, analysis_id: int, source: SourceStudy) -> None:
    claim = claimed(sessions, analysis_id)
    output = output_for(source, analysis_id=analysis_id, answers=ANSWERS)
    arrays = arrays_of(output.retention.inputs, (4, 4)).to_npz()
    path, sha256 = store_output(settings.data.path / "outputs" / str(analysis_id), claim.fence, output, arrays)
    with sessions.begin() as session:
        assert transitions.close_read(
            session,
            claim,
            output,
            output_path=str(path.relative_to(settings.data.path)),
            output_sha256=sha256,
            now=NOW + timedelta(seconds=5),
            actor=ACTOR,
        )
        assert session.get(Analysis, analysis_id) is not None
