"""The hash chain over the audit

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit_chain",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("event_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_chain")),
        sa.UniqueConstraint("event_id", name=op.f("uq_audit_chain_event_id")),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER audit_chain_no_{verb} BEFORE {verb.upper()} ON audit_chain "
                "BEGIN SELECT RAISE(ABORT, 'audit_chain is append-only'); END"
            )
        op.execute(  # INSERT OR REPLACE deletes what it replaces, and fires no trigger for that
            "CREATE TRIGGER audit_chain_no_replace BEFORE INSERT ON audit_chain "
            "WHEN EXISTS (SELECT 1 FROM audit_chain WHERE seq = NEW.seq OR event_id = NEW.event_id) "
            "BEGIN SELECT RAISE(ABORT, 'audit_chain is append-only'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION audit_chain_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit_chain is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_chain_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_chain "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_chain_append_only()"
    )


def downgrade() -> None:
    """The chain goes with its table; the next upgrade chains every event anew, so keep the exported heads."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete", "replace"):
            op.execute(f"DROP TRIGGER audit_chain_no_{verb}")
    else:
        op.execute("DROP TRIGGER audit_chain_no_change ON audit_chain")
        op.execute("DROP FUNCTION audit_chain_append_only()")
    op.drop_table("audit_chain")
