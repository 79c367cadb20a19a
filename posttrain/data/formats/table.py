"""The row formats by name, and what to say where one does not fit."""

from collections.abc import Iterable

from posttrain.data.formats import (
    alpaca,
    arc,
    code_act,
    code_feedback,
    code_task,
    commitpackft,
    decision_table,
    editpackft,
    evaluation,
    glaive,
    gsm8k,
    hermes,
    hh_rlhf,
    messages,
    plain,
    prompts,
    rt_trace,
    sharegpt,
    smoltalk,
    xlam,
)
from posttrain.data.formats.format import Format
from posttrain.errors import DataError
from posttrain.recipe.types import RowFormat

FORMATS: dict[RowFormat, Format] = {
    "text": plain.FORMAT,
    "messages": messages.FORMAT,
    "sharegpt": sharegpt.FORMAT,
    "alpaca": alpaca.FORMAT,
    "prompt_only": prompts.PROMPT_ONLY,
    "prompt_completion": prompts.PROMPT_COMPLETION,
    "preference": prompts.PREFERENCE,
    "unpaired_preference": prompts.UNPAIRED_PREFERENCE,
    "stepwise": prompts.STEPWISE,
    "glaive": glaive.FORMAT,
    "xlam": xlam.FORMAT,
    "hermes": hermes.FORMAT,
    "code_act": code_act.FORMAT,
    "commitpackft": commitpackft.FORMAT,
    "editpackft": editpackft.FORMAT,
    "hh_rlhf": hh_rlhf.FORMAT,
    "code_feedback": code_feedback.FORMAT,
    "code_task": code_task.FORMAT,
    "gsm8k": gsm8k.FORMAT,
    "arc": arc.FORMAT,
    "smoltalk": smoltalk.FORMAT,
    "decision_table": decision_table.FORMAT,
    "rt_trace": rt_trace.FORMAT,
    "evaluation": evaluation.FORMAT,
}
"""All but `rows`, which is our own shape and checked by `posttrain.data.rows` alone."""


def fitting(columns: Iterable[str]) -> list[RowFormat]:
    """Names of the formats whose columns are all there, the most demanding first."""
    present = frozenset(columns)
    fits = [(name, made) for name, made in FORMATS.items() if made.fits(present)]
    return [name for name, made in sorted(fits, key=lambda pair: -len(pair[1].columns))]


def check_content(name: RowFormat, content: str, where: str) -> None:
    """DataError where the format cannot make rows of this content."""
    if name == "rows" or content in FORMATS[name].makes:
        return
    others = [other for other, made in FORMATS.items() if content in made.makes]
    raise DataError(
        f"{where}: format {name!r} makes {' and '.join(FORMATS[name].makes)}, not {content}; "
        f"{content} come from rows, {', '.join(others)}"
    )


def check_columns(name: RowFormat, columns: Iterable[str], where: str) -> None:
    """DataError, naming the formats that would fit, where columns are missing."""
    present = list(columns)
    if name == "rows" or FORMATS[name].fits(frozenset(present)):
        return
    missing = [column for column in FORMATS[name].columns if column not in present]
    fits = fitting(present)
    advice = f"formats that fit them: {', '.join(fits)}" if fits else "no format fits them"
    raise DataError(
        f"{where}: format {name!r} needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}, "
        f"but there are {', '.join(present) or 'none'}; {advice}"
    )
