"""Traces, scores, models."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None
SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "traces",
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(36), nullable=False, unique=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("trace_version", sa.String(64), nullable=False),
        sa.Column("source", sa.String(256)),
        sa.Column("game", sa.String(256)),
    )
    op.create_index("traces_by_source", "traces", ["source", "game", "seq"])
    op.create_index("traces_by_game", "traces", ["game", "seq"])
    op.create_index("traces_by_time", "traces", ["created_at", "seq"])
    op.create_table(
        "trace_bodies",
        sa.Column("seq", SEQUENCE, sa.ForeignKey("traces.seq"), primary_key=True, autoincrement=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("final_answer", sa.Text(), nullable=False),
        sa.Column("steps", sa.JSON(), nullable=False),
        sa.Column("meta", sa.JSON(), nullable=False),
    )
    op.create_table(
        "scores",
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("trace_seq", SEQUENCE, sa.ForeignKey("traces.seq"), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("criteria", sa.String(64), nullable=False),
        sa.Column("score", sa.Float()),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.create_index("scores_by_trace", "scores", ["trace_seq", "seq"])
    op.create_table(
        "models",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("description", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "model_versions",
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("model", sa.String(64), sa.ForeignKey("models.name"), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("phase", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("state", sa.JSON(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("description", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.UniqueConstraint("model", "version", name="model_versions_once"),
    )


def downgrade() -> None:
    for table in ("model_versions", "models", "scores", "trace_bodies", "traces"):
        op.drop_table(table)
