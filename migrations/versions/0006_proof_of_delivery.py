"""Proof of delivery: storage commitment, or a C-FIND that finds the result

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("delivery") as table:
        table.add_column(sa.Column("proof_at", sa.DateTime(timezone=True), nullable=True))
        table.add_column(sa.Column("proof_attempts", sa.Integer(), server_default="0", nullable=False))
        table.add_column(sa.Column("transaction_uid", sa.String(length=64), nullable=True))
        table.add_column(sa.Column("committed_at", sa.DateTime(timezone=True), nullable=True))
        table.create_index(op.f("ix_delivery_proof_at"), ["proof_at"])
        table.create_index(op.f("ix_delivery_transaction_uid"), ["transaction_uid"])


def downgrade() -> None:
    with op.batch_alter_table("delivery") as table:
        table.drop_index(op.f("ix_delivery_transaction_uid"))
        table.drop_index(op.f("ix_delivery_proof_at"))
        for column in ("committed_at", "transaction_uid", "proof_attempts", "proof_at"):
            table.drop_column(column)
