"""People whom a sign-in service knows

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("user_account") as batch:
        batch.add_column(sa.Column("issuer", sa.String(length=255), nullable=True))
        batch.add_column(sa.Column("subject", sa.String(length=255), nullable=True))
        batch.create_unique_constraint("uq_user_account_issuer_subject", ["issuer", "subject"])


def downgrade() -> None:
    """The people stay as accounts without a password: nobody can sign in as one of them."""
    with op.batch_alter_table("user_account") as batch:
        batch.drop_constraint("uq_user_account_issuer_subject", type_="unique")
        batch.drop_column("subject")
        batch.drop_column("issuer")
