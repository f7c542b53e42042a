"""Which files an analysis reads: one answer for the worker that reads them and the report that cites them."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.shared.db import Analysis, Instance


def inputs_of(session: Session, analysis: Analysis) -> list[Instance]:
    """The image instances up to the analysis' revision, each SOP Instance UID once.

    Of several contents under one UID the one received last: a sender that repeats a UID with other bytes has
    corrected it.
    """
    received = session.scalars(
        select(Instance)
        .where(
            Instance.study_id == analysis.study_id,
            Instance.is_image.is_(True),
            Instance.revision <= analysis.revision,
        )
        .order_by(Instance.received_at, Instance.id)
    )
    return list({instance.sop_instance_uid: instance for instance in received}.values())
