"""What monitoring and long lists need: totals of the audit, acquisitions, indexes

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from service.shared import db

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ANALYSIS_COLUMNS = ("per_input", "software")
# name: table, columns, the rows that it holds where that is not all of them
INDEXES: dict[str, tuple[str, list[str], str | None]] = {
    "ix_study_first_received_at": ("study", ["first_received_at"], None),
    "ix_study_calling_ae_first_received_at": ("study", ["calling_ae", "first_received_at"], None),
    "ix_study_held": ("study", ["held"], "held"),
    "ix_result_state": ("result", ["state"], "state = 'quarantined'"),
    "ix_delivery_state_destination_created_at": ("delivery", ["state", "destination", "created_at"], None),
}


def upgrade() -> None:
    op.create_table(
        "acquisition",
        sa.Column(
            "analysis_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("at", db.UtcDateTime(timezone=True), nullable=False),
        sa.Column("scanner", sa.Text(), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("method", sa.String(length=16), nullable=False),
        sa.Column("inputs", sa.Integer(), nullable=False),
        sa.Column("inputs_kept", sa.Integer(), nullable=False),
        sa.Column("tokens_in", sa.Integer(), nullable=False),
        sa.Column("tokens_kept", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["analysis_id"], ["analysis.id"], name=op.f("fk_acquisition_analysis_id_analysis")),
        sa.PrimaryKeyConstraint("analysis_id", name=op.f("pk_acquisition")),
    )
    op.create_index(op.f("ix_acquisition_at"), "acquisition", ["at"], unique=False)
    op.create_table(
        "tally",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column(
            "totals",
            sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tally")),
    )
    for name in ANALYSIS_COLUMNS:
        column = sa.Column(
            name, sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=True
        )
        op.add_column("analysis", column)
    for name, (table, columns, condition) in INDEXES.items():
        where = None if condition is None else sa.text(condition)
        op.create_index(op.f(name), table, columns, unique=False, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    for name, (table, _, _) in reversed(INDEXES.items()):
        op.drop_index(op.f(name), table_name=table)
    for name in reversed(ANALYSIS_COLUMNS):
        op.drop_column("analysis", name)  # not as a batch: a rebuilt table would take its children's rows along
    op.drop_table("tally")
    op.drop_index(op.f("ix_acquisition_at"), table_name="acquisition")
    op.drop_table("acquisition")
