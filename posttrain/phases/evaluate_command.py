"""What `posttrain eval` does: ask a set of a model, keep answers and scorecard as files, tell what was kept.

An evaluation is a folder: `answers.jsonl`, a line per task, and `evaluation.json`, written last and atomically.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.evaluation_sets import Asked
from posttrain.errors import InputError
from posttrain.phases.chosen_model import ChosenModel
from posttrain.phases.context import Progress
from posttrain.phases.evaluate import answer_tasks, counts, means
from posttrain.recipe.types import EvaluatePhase, Execution, Precision, Sampling, Vote
from posttrain.report.read import read_object
from posttrain.report.scorecard import scorecard
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run.folder import write_atomic, write_json_atomic
from posttrain.run.journal import as_line


@dataclass(frozen=True)
class Asking:
    """How the tasks are asked."""

    sampling: Sampling
    vote: Vote | None
    seed: int
    precision: Precision


def evaluate(
    chosen: ChosenModel,
    asked: Asked,
    asking: Asking,
    execution: Execution,
    folder: Path,
    overwrite: bool,
    say: Callable[[str], None],
    show: Callable[[str, float, str, float], Progress],
) -> dict[str, Any]:
    """The evaluation in `folder`: made now, or found there where it is of the same model, set and settings.

    InputError where another one lies there.
    """
    identity = identity_of(chosen, asked, asking)
    stored = read_object(folder / "evaluation.json", {})
    if stored and not overwrite:
        changed = [name for name, value in identity.items() if stored.get(name) != value]
        if changed:
            raise InputError(
                f"{folder} holds another evaluation: its {', '.join(changed)} differ; give this one another --name, or "
                f"replace it with --overwrite"
            )
        say(f"{folder}: is there already, of the same model, set and settings")
        return stored
    started = time.perf_counter()
    answers = ask(chosen, asked, asking, execution, show)
    record = {
        **identity,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
        "posttrain": __version__,
        "device": execution.device,
        "left_out": asked.left_out,
        "metrics": means(answers),
        "counts": counts(answers),
        "scorecard": [line.json() for line in scorecard(answers)],
    }
    (folder / "evaluation.json").unlink(missing_ok=True)
    write_atomic(folder / "answers.jsonl", b"".join(as_line(answer) for answer in answers))
    write_json_atomic(folder / "evaluation.json", record)
    return record


def identity_of(chosen: ChosenModel, asked: Asked, asking: Asking) -> dict[str, Any]:
    """What decides the answers, but for the machine."""
    return {
        "model": {"name": chosen.name, "state": chosen.state, "digests": chosen.digests()},
        "set": {"name": asked.name, "digest": asked.digest, "rows": len(asked.rows)},
        "chat": chosen.chat.model_dump(mode="json"),
        "sampling": asking.sampling.model_dump(mode="json"),
        "vote": asking.vote.model_dump(mode="json") if asking.vote else None,
        "seed": asking.seed,
        "precision": asking.precision,
    }


def ask(
    chosen: ChosenModel,
    asked: Asked,
    asking: Asking,
    execution: Execution,
    show: Callable[[str, float, str, float], Progress],
) -> list[dict[str, Any]]:
    phase = EvaluatePhase(
        kind="evaluate",
        name="eval",
        model="base",
        datasets=("set",),
        shots=0,
        vote=asking.vote,
        sampling=asking.sampling,
        precision=asking.precision,
        gates=(),
    )
    render = renderer(chosen.chat, Tokenizer.load(chosen.base))
    sampler = InProcessSampler(
        chosen.load(execution, asking.precision), render.stop_tokens, asking.precision, execution.rollout_tokens
    )
    return answer_tasks(sampler, render, phase, asked.name, asked.rows, asking.seed, show)
