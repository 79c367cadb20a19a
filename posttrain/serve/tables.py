"""What the database holds: traces with their scores, and registered models. Runs and datasets stay files."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Sequence = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up only what it calls INTEGER."""


class Table(DeclarativeBase):
    pass


class TraceRow(Table):
    """What lists and filters look at; kept narrow, so that a page far down a long list is found quickly."""

    __tablename__ = "traces"
    __table_args__ = (
        Index("traces_by_source", "source", "game", "seq"),
        Index("traces_by_game", "game", "seq"),
        Index("traces_by_time", "created_at", "seq"),
    )

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(36), unique=True)
    created_at: Mapped[float] = mapped_column(Float)
    """Unix seconds."""
    trace_version: Mapped[str] = mapped_column(String(64))
    source: Mapped[str | None] = mapped_column(String(256))
    game: Mapped[str | None] = mapped_column(String(256))
    """Both as in `meta`, where they are texts."""


class TraceBody(Table):
    __tablename__ = "trace_bodies"

    seq: Mapped[int] = mapped_column(Sequence, ForeignKey("traces.seq"), primary_key=True, autoincrement=False)
    prompt: Mapped[str] = mapped_column(Text)
    final_answer: Mapped[str] = mapped_column(Text)
    steps: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    meta: Mapped[dict[str, Any]] = mapped_column(JSON)


class ScoreRow(Table):
    __tablename__ = "scores"
    __table_args__ = (Index("scores_by_trace", "trace_seq", "seq"),)

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    trace_seq: Mapped[int] = mapped_column(Sequence, ForeignKey("traces.seq"))
    created_at: Mapped[float] = mapped_column(Float)
    criteria: Mapped[str] = mapped_column(String(64))
    score: Mapped[float | None] = mapped_column(Float)
    """None: unscorable, for the reason in `details`."""
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


class ModelRow(Table):
    __tablename__ = "models"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    description: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Float)


class ModelVersionRow(Table):
    __tablename__ = "model_versions"
    __table_args__ = (UniqueConstraint("model", "version", name="model_versions_once"),)

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    model: Mapped[str] = mapped_column(String(64), ForeignKey("models.name"))
    version: Mapped[str] = mapped_column(String(64))
    run: Mapped[str] = mapped_column(String(64))
    phase: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))
    """Of the files the phase made, as `run.folder.digest_folder` has it."""
    state: Mapped[dict[str, Any]] = mapped_column(JSON)
    """Base and adapter with their digests."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    description: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Float)
