"""Events of the audit by kind and by person

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_audit_event_kind_id"), "audit_event", ["kind", "id"], unique=False)
    op.create_index(op.f("ix_audit_event_actor_id"), "audit_event", ["actor", "id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_audit_event_actor_id"), table_name="audit_event")
    op.drop_index(op.f("ix_audit_event_kind_id"), table_name="audit_event")
