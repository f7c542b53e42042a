"""What must hold after whatever was done to the service; each breach is one line with its evidence.

Reads the senders' ledger, the database, the spool, the outbox and the folder of the PACS. Repairs nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Instance, Result, Study, StudyState
from tests.prove.load import Key
from tests.running import FINAL, data_set_of


def is_at_rest(sessions: sessionmaker[Session], acknowledged: Iterable[Key]) -> bool:
    """Every acknowledged instance has its row, every analysis its final state, and no delivery waits."""
    with sessions() as session:
        known = set(session.execute(select(Study.study_uid, Instance.sop_instance_uid).join_from(Instance, Study)))
        open_studies = session.scalars(
            select(Study.id).where((Study.state != StudyState.COMPLETE) | (Study.dispatched_revision < Study.revision))
        ).first()
        states = set(session.scalars(select(Analysis.state).distinct()))
        pending = session.scalars(select(Delivery.id).where(Delivery.state == DeliveryState.PENDING)).first()
    return set(acknowledged) <= {(one[0], one[1]) for one in known} and (
        open_studies is None and {str(state) for state in states} <= FINAL and pending is None
    )


def ended(sessions: sessionmaker[Session]) -> int:
    """Studies whose last revision has an analysis in a final state."""
    with sessions() as session:
        analysis = select(Analysis.id).where(
            Analysis.study_id == Study.id,
            Analysis.revision == Study.revision,
            Analysis.state.in_([AnalysisState(state) for state in FINAL]),
        )
        return len(session.scalars(select(Study.id).where(analysis.exists())).all())


def lost_instances(acknowledged: Mapping[Key, str], sessions: sessionmaker[Session], spool: Path) -> Iterator[str]:
    """Acknowledged instances that are not in exactly one study, or whose file does not hold what was sent."""
    rows: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    with sessions() as session:
        for uid, study_uid, digest, path in session.execute(
            select(Instance.sop_instance_uid, Study.study_uid, Instance.sha256, Instance.path).join_from(
                Instance, Study
            )
        ):
            rows[uid].append((study_uid, digest, path))
    for (study_uid, uid), digest in acknowledged.items():
        found = rows[uid]
        if len(found) != 1 or found[0][:2] != (study_uid, digest):
            yield f"instance {uid} was acknowledged once for study {study_uid}; on record: {found}"
            continue
        file = spool / found[0][2]
        try:
            held = sha256(data_set_of(file.read_bytes())).hexdigest()
        except (OSError, AssertionError) as error:
            yield f"instance {uid} was acknowledged; {file}: {type(error).__name__}"
            continue
        if held != digest:
            yield f"instance {uid}: {file} holds {held}, acknowledged was {digest}"


def loose_ends(sessions: sessionmaker[Session]) -> Iterator[str]:
    """Revisions without exactly one analysis in a final state, and deliveries that ended nowhere."""
    with sessions() as session:
        studies = session.scalars(select(Study)).all()
        analyses = session.scalars(select(Analysis)).all()
        stuck = session.execute(
            select(Delivery.id, Delivery.state, Delivery.reason).where(Delivery.state != DeliveryState.DELIVERED)
        ).all()
        undelivered = session.scalars(
            select(Analysis.id).where(
                Analysis.state == AnalysisState.DONE,
                ~select(Delivery.id).join(Result).where(Result.analysis_id == Analysis.id).exists(),
            )
        ).all()
    by_revision: dict[tuple[int, int], list[Analysis]] = defaultdict(list)
    for analysis in analyses:
        by_revision[analysis.study_id, analysis.revision].append(analysis)
    for study in studies:
        if study.state is not StudyState.COMPLETE:
            yield f"study {study.id} is still {study.state}"
        if not by_revision[study.id, study.revision]:
            yield f"study {study.id} revision {study.revision} has no analysis"
    for (study_id, revision), found in by_revision.items():
        routes = Counter(one.route for one in found)
        if set(routes.values()) != {1}:
            yield f"study {study_id} revision {revision} has analyses {dict(routes)}"
        for one in found:
            if str(one.state) not in FINAL:
                yield f"analysis {one.id} of study {study_id} is still {one.state}: {one.reason}"
    for delivery_id, state, reason in stuck:
        yield f"delivery {delivery_id} is {state}: {reason}"
    for analysis_id in undelivered:
        yield f"analysis {analysis_id} is done and nothing of it was ever to be delivered"


def wrong_reports(sessions: sessionmaker[Session], data: Path, pacs: Iterable[Path]) -> Iterator[str]:
    """Reports at the PACS that are not the one report of a finished analysis, byte for byte, or are missing there."""
    with sessions() as session:
        results = {
            uid: (analysis_id, path)
            for uid, analysis_id, path in session.execute(
                select(Result.sop_instance_uid, Result.analysis_id, Result.path)
            )
        }
        done = set(session.scalars(select(Analysis.id).where(Analysis.state == AnalysisState.DONE)))
    at_pacs: dict[int, set[str]] = defaultdict(set)
    for file in pacs:
        content = file.read_bytes()
        try:
            uid = str(dcmread(file, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
            received = data_set_of(content)
        except (InvalidDicomError, AttributeError, AssertionError, EOFError):
            continue  # the sender was killed in the middle of it: storescp keeps halves, and no Success was said
        if uid not in results:
            yield f"{file.name} at the PACS: no result on record has its UID {uid}"
            continue
        analysis_id, path = results[uid]
        built = data_set_of((data / path).read_bytes())
        if received != built and not built.startswith(received):
            yield f"{file.name} at the PACS differs from the result of analysis {analysis_id}"
        if received == built:
            at_pacs[analysis_id].add(uid)
    for analysis_id in done:
        if len(at_pacs[analysis_id]) != 1:
            yield f"analysis {analysis_id} is done; distinct reports of it at the PACS: {len(at_pacs[analysis_id])}"
    for analysis_id in set(at_pacs) - done:
        yield f"analysis {analysis_id} is not done, and a report of it is at the PACS"


def all_broken(
    acknowledged: Mapping[Key, str], sessions: sessionmaker[Session], *, spool: Path, data: Path, pacs: Iterable[Path]
) -> list[str]:
    """Every breach, once the service is at rest."""
    return [
        *lost_instances(acknowledged, sessions, spool),
        *loose_ends(sessions),
        *wrong_reports(sessions, data, pacs),
    ]
