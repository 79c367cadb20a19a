"""Where a phase stands: what has to be done for it, and why. The same answer serves `plan`, `status` and the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from posttrain.phases.context import ModelState
from posttrain.pipeline.history import History
from posttrain.pipeline.results import Result, changed_source, damaged_output, identity, read_result, state_of
from posttrain.recipe.inputs import phases_read
from posttrain.recipe.types import Phase, Recipe
from posttrain.run.folder import RunFolder, digest_json


@dataclass(frozen=True)
class Standing:
    todo: Literal["skip", "start", "resume", "restart", "wait"]
    """`restart` throws away what is in the phase's folder; `wait` is known only once an input has been made."""
    reason: str
    fingerprint: str | None
    result: Result | None = None
    damaged: str | None = None
    """Entry of the phase's folder that no longer verifies and has to go before the phase resumes."""


def inputs_of(recipe: Recipe, phase: Phase, results: Mapping[str, Result]) -> dict[str, str]:
    return {name: identity(results[name]) for name in phases_read(recipe, phase)}


def fingerprint(recipe: Recipe, phase: Phase, base: ModelState, inputs: Mapping[str, str]) -> str:
    """Digest of everything that decides what the phase makes; gates only judge it and stay out."""
    specification = phase.model_dump(mode="json", exclude={"gates"})
    chat = recipe.chat.model_dump(mode="json")
    return digest_json(
        {"phase": specification, "seed": recipe.seed, "chat": chat, "base": base.base_digest, "inputs": dict(inputs)}
    )


def standing(
    run: RunFolder,
    recipe: Recipe,
    phase: Phase,
    base: ModelState,
    results: Mapping[str, Result],
    history: History,
) -> Standing:
    """results: those of the earlier phases that are complete."""
    missing = [name for name in phases_read(recipe, phase) if name not in results]
    if missing:
        return Standing("wait", f"after {', '.join(missing)}", None)
    expected = fingerprint(recipe, phase, base, inputs_of(recipe, phase, results))
    if phase.name in history.redo:
        return Standing("restart", "asked for with --from", expected)
    folder = run.phase(phase.name)
    result, fault = read_result(folder)
    damaged = None
    if result is not None and result["fingerprint"] == expected:
        changed = changed_source(result)
        if changed is not None:
            return Standing("restart", f"{changed} changed since it was read", expected)
        damaged = damaged_output(folder, result)
        unfinished = result["details"].get("unfinished")
        if damaged is None and unfinished:
            return Standing("resume", f"{', '.join(unfinished)} failed the last time", expected)
        if damaged is None:
            return Standing("skip", "complete and unchanged", expected, result)
    begun = history.started.get(phase.name)
    if begun is None:
        # A folder that no journal event speaks of cannot be trusted; there is none on a first start.
        return Standing("restart" if folder.path.exists() else "start", fault or "not begun", expected)
    if begun != expected:
        known = "its inputs changed since it was begun" if begun else "the journal does not say of what it was begun"
        return Standing("restart", known, expected)
    if damaged is not None:
        return Standing("resume", f"its output {damaged.fault}", expected, damaged=damaged.entry)
    return Standing("resume", fault or "begun, not complete", expected)


def survey(run: RunFolder, recipe: Recipe, base: ModelState, history: History) -> dict[str, Standing]:
    """Where every phase stands, in the recipe's order."""
    results: dict[str, Result] = {}
    found = {}
    for phase in recipe.phases:
        found[phase.name] = standing(run, recipe, phase, base, results, history)
        result = found[phase.name].result
        if result is not None:
            results[phase.name] = result
    return found


def states_of(base: ModelState, results: Mapping[str, Result]) -> dict[str, ModelState]:
    made = {name: state_of(result) for name, result in results.items()}
    return {"base": base} | {name: state for name, state in made.items() if state is not None}
