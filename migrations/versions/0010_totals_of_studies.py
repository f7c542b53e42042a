"""How much came of each study, kept with it; deliveries by time and destination, analyses by route

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_delivery_delivered_at": ("delivery", ["delivered_at"]),
    "ix_delivery_destination_id": ("delivery", ["destination", "id"]),
    "ix_analysis_route_study_id": ("analysis", ["route", "study_id"]),
}


def upgrade() -> None:
    op.add_column("study", sa.Column("instances", sa.Integer(), server_default="0", nullable=False))
    op.add_column("study", sa.Column("size_bytes", sa.BigInteger(), server_default="0", nullable=False))
    op.execute(
        "UPDATE study SET instances = (SELECT count(*) FROM instance WHERE instance.study_id = study.id), "
        "size_bytes = (SELECT coalesce(sum(instance.size_bytes), 0) FROM instance WHERE instance.study_id = study.id)"
    )
    for name, (table, columns) in INDEXES.items():
        op.create_index(op.f(name), table, columns, unique=False)


def downgrade() -> None:
    for name, (table, _) in reversed(INDEXES.items()):
        op.drop_index(op.f(name), table_name=table)
    op.drop_column("study", "size_bytes")  # not as a batch: a rebuilt table would take its children's rows along
    op.drop_column("study", "instances")
