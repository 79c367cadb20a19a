"""Evaluations over HTTP: who did best on what, read from the runs' files."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from posttrain.report.read import Row, mapping, number, read_object, read_run
from posttrain.run.existing import run_names
from posttrain.run.folder import BASELINES, EVALUATIONS, RunFolder
from posttrain.serve.problems import RESPONSES
from posttrain.serve.settings import Serving, Settings

router = APIRouter(prefix="/api/evaluations", tags=["evaluations"], responses=RESPONSES)
SCORE = ".score"


class Entry(BaseModel):
    rank: int
    """Among those on the same dataset with the same rows."""
    dataset: str
    dataset_digest: str | None
    """Of the rows that were asked; what differs in it is not comparable."""
    score: float
    asked: int | None
    run: str | None
    evaluation: str
    """As `posttrain report --before` takes it."""
    model: str


@router.get("/leaderboard")
def leaderboard(
    settings: Serving,
    dataset: Annotated[str | None, Query(max_length=256)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[Entry]:
    """Mean scores, the best of each dataset first; unscorable answers are in no mean."""
    found = [entry for entry in _entries(settings) if dataset is None or entry.dataset == dataset]
    found.sort(key=lambda entry: (entry.dataset, entry.dataset_digest or "", -entry.score, entry.evaluation))
    for before, entry in zip([None, *found], found, strict=False):
        same = before is not None and _of(before) == _of(entry)
        entry.rank = before.rank + 1 if same and before else 1
    return found[:limit]


def _of(entry: Entry) -> tuple[str, str | None]:
    return entry.dataset, entry.dataset_digest


def _entries(settings: Settings) -> Iterator[Entry]:
    for name in run_names(settings.runs_dir):
        yield from _of_run(RunFolder(settings.runs_dir / name))
    for pattern in (f"{EVALUATIONS}/*", f"{BASELINES}/*", "*/evaluations/*"):
        for file in settings.runs_dir.glob(f"{pattern}/evaluation.json"):
            record = read_object(file, {})
            run = file.parts[-4] if file.parts[-3] == "evaluations" else None
            word = f"{run}/{file.parent.name}" if run else file.parent.name
            asked, model = mapping(record.get("set")), mapping(record.get("model"))
            told = f"{model.get('name')}/{model.get('state')}"
            yield from _scores(record, run, word, told, {None: asked.get("digest")})


def _of_run(run: RunFolder) -> Iterator[Entry]:
    record = read_run(run, answers=False)
    digests: dict[str | None, str | None] = {}
    for files in mapping(record.manifest.get("datasets")).values():
        for path, digest in mapping(files).items():
            parts = path.split("/")
            if len(parts) == 3 and parts[2] == "rows.jsonl":
                digests[parts[1]] = digest
    for phase in record.phases:
        if phase.kind == "evaluate" and phase.complete:
            word = f"{run.path.name}/{phase.name}"
            yield from _scores(phase.result, run.path.name, word, str(phase.spec.get("model")), digests)


def _scores(
    record: Row, run: str | None, evaluation: str, model: str, digests: dict[str | None, str | None]
) -> Iterator[Entry]:
    counts = mapping(record.get("counts"))
    for name, value in mapping(record.get("metrics")).items():
        score, dataset = number(value), name.removesuffix(SCORE)
        if score is None or not name.endswith(SCORE):
            continue
        asked = number(counts.get(f"{dataset}.asked"))
        yield Entry(
            rank=0,
            dataset=dataset,
            dataset_digest=digests.get(dataset, digests.get(None)),
            score=score,
            asked=None if asked is None else int(asked),
            run=run,
            evaluation=evaluation,
            model=model,
        )
