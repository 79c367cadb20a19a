"""Evaluations by name: where the answers of one lie, and named baselines, copies of one kept beside the runs."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import InputError, RunFolderError
from posttrain.recipe.spelling import did_you_mean
from posttrain.report.comparison import Evaluation
from posttrain.report.read import Row, read_answers, read_object
from posttrain.run.folder import BASELINES, EVALUATIONS, NAME, RunFolder, fsync_folder, write_atomic

FILES = ("answers.jsonl", "evaluation.json")


@dataclass(frozen=True)
class Kept:
    """Answers to one or more sets by one model state, as they lie on disk."""

    name: str
    record: Row
    """`evaluation.json`; empty for an evaluation phase and for a bare file of answers."""
    evaluation: Evaluation
    unreadable: int
    """Lines of answers that could not be read."""


def find(runs_dir: Path, word: str) -> Kept:
    """A baseline's name, `RUN/EVALUATION`, `RUN/PHASE`, an evaluation of a model folder, or a file or folder."""
    places = [
        runs_dir / BASELINES / word / FILES[0],
        runs_dir / EVALUATIONS / word / FILES[0],
        Path(word) if Path(word).is_file() else Path(word) / FILES[0],
    ]
    run, _, name = word.partition("/")
    if name and NAME.fullmatch(run) and NAME.fullmatch(name):
        folder = RunFolder(runs_dir / run)
        places[:0] = [folder.evaluations / name / FILES[0], folder.phase(name).answers]
    for place in places:
        if place.is_file():
            return _read(word, place)
    known = names(runs_dir)
    raise InputError(
        f"there is no evaluation {word!r}{did_you_mean(word, known)}; there are {', '.join(known[:12]) or 'none'}; "
        f"posttrain eval makes one"
    )


def _read(word: str, place: Path) -> Kept:
    unreadable: dict[str, int] = {}
    answers = tuple(read_answers(place, unreadable))
    if not answers:
        raise InputError(f"{place} holds no answer")
    by_dataset = {
        dataset: tuple(a for a in answers if a.dataset == dataset) for dataset in {a.dataset for a in answers}
    }
    evaluation = Evaluation(phase=word, model=word, shots=0, answers=dict(sorted(by_dataset.items())))
    return Kept(word, read_object(place.with_name(FILES[1]), unreadable), evaluation, sum(unreadable.values()))


def names(runs_dir: Path) -> list[str]:
    """Every evaluation there is, as `find` takes it."""
    kept = [path.parent.name for room in (BASELINES, EVALUATIONS) for path in runs_dir.glob(f"{room}/*/{FILES[0]}")]
    of_runs = [
        f"{path.relative_to(runs_dir).parts[0]}/{path.parent.name}"
        for pattern in ("evaluations", "phases")
        for path in runs_dir.glob(f"*/{pattern}/*/{FILES[0]}")
    ]
    return sorted(kept) + sorted(of_runs)


def save(runs_dir: Path, name: str, evaluation: Path) -> Path:
    """Copy an evaluation's folder to the baseline `name`; one that is there already is kept under its name."""
    if not NAME.fullmatch(name):
        raise InputError(f"baseline {name!r}: use lower-case letters, digits, '.', '_' and '-', at most 64")
    place = runs_dir / BASELINES / name
    if place.exists():
        if all((place / file).read_bytes() == (evaluation / file).read_bytes() for file in FILES):
            return place
        raise RunFolderError(f"baseline {name!r} is another evaluation, {place}: choose another name, or remove it")
    temporary = place.with_name(f".{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for file in FILES:
        write_atomic(temporary / file, (evaluation / file).read_bytes())
    temporary.rename(place)
    fsync_folder(place.parent)
    return place
