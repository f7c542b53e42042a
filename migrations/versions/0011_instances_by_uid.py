"""Instances by their UID alone, which is all that a request for storage commitment tells of them

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_instance_sop_instance_uid"), "instance", ["sop_instance_uid"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_instance_sop_instance_uid"), table_name="instance")
