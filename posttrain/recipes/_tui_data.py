"""Data of the `tui` curriculum: tool calls, agent trajectories and preferences, whole or for a quick test."""

from posttrain.recipe.types import EVERY_ROW, Dataset, Differs, FileSource, HubSource, Part, RowFormat, TextLength
from posttrain.recipes._hub import dataset, hub, take

SHUFFLE_SEED = 42
LANGUAGES = ("python", "javascript", "go", "rust", "java", "typescript")
EDITED = Differs(kind="differs", first="old_contents", second="new_contents", at_most=8000)
HERMES, XLAM = "NousResearch/hermes-function-calling-v1", "Salesforce/xlam-function-calling-60k"
HERMES_FILES = ("func-calling-singleturn.json", "func-calling.json")
PARTS = 10
ASKED, PRACTISED, TRAINED = (0,), (1,), tuple(range(2, PARTS))
"""Parts of the recorded calls: what evaluations ask, what GRPO plays, and what SFT reads."""
HELDOUT = 200
LONG_ENOUGH = TextLength(kind="text_length", column="answer", at_least=100, at_most=None)


def tui_data(quick_test: bool, tool_tokens: int, agent_tokens: int, preference_tokens: int) -> tuple[Dataset, ...]:
    """`tool_calls`, `agent` and `preferences`; rows longer than their tokens are left out."""
    return (
        dataset("tool_calls", "conversations", _tool_calls(quick_test), tool_tokens),
        dataset("agent", "conversations", _agent(quick_test), agent_tokens),
        dataset("preferences", "pairs", _preferences(quick_test), preference_tokens),
    )


def tui_tasks(quick_test: bool, task_file: str, task_format: RowFormat, task_tokens: int) -> tuple[Dataset, ...]:
    """`call_tasks` for GRPO, the tasks of a file among them, and `calls` and `heldout_pairs` to evaluate on."""
    own = tuple(
        FileSource(kind="file", path=path, format=task_format, filters=(), selection=EVERY_ROW, reasoning_effort=None)
        for path in (task_file,)
        if path
    )
    limit = 100 if quick_test else None
    pairs = hub("Anthropic/hh-rlhf", "hh_rlhf", take(HELDOUT // (10 if quick_test else 1), None), split="test")
    return (
        _lenient(dataset("call_tasks", "tasks", (*_recorded(PRACTISED, limit), *own), task_tokens)),
        _lenient(dataset("calls", "tasks", _recorded(ASKED, HELDOUT // (10 if quick_test else 1)), task_tokens)),
        dataset("heldout_pairs", "pairs", (pairs,), task_tokens),
    )


def _lenient(tasks: Dataset) -> Dataset:
    """Some recorded conversations have no call in them."""
    return tasks.model_copy(update={"faulty_share": 0.25})


def _recorded(parts: tuple[int, ...], limit: int | None) -> tuple[HubSource, ...]:
    """Calls of these parts as rows of any content that their formats make."""
    return (
        hub(XLAM, "xlam", take(limit, None), filters=(_part("query", parts),), optional=True),
        *(
            hub(HERMES, "hermes", take(limit, None), files=files, filters=(_part("conversations", parts),))
            for files in HERMES_FILES
        ),
    )


def _part(column: str, parts: tuple[int, ...]) -> Part:
    return Part(kind="part", column=column, of=PARTS, keep=parts)


def _tool_calls(quick: bool) -> tuple[HubSource, ...]:
    # A quick test takes the first rows, so that only the beginning of a set is downloaded.
    glaive = hub("glaiveai/glaive-function-calling-v2", "glaive", take(500 if quick else None, None))
    xlam = hub(XLAM, "xlam", take(200 if quick else None, None), filters=(_part("query", TRAINED),), optional=True)
    hermes = (
        hub(
            HERMES,
            "hermes",
            take(150 if quick else None, None),
            files=files,
            filters=(_part("conversations", TRAINED),),
        )
        for files in HERMES_FILES
    )
    return glaive, xlam, *hermes


def _agent(quick: bool) -> tuple[HubSource, ...]:
    code_act = (
        hub("xingyaoww/code-act", "code_act", take(100 if quick else None, None), split=split, effort="high")
        for split in ("codeact", "general")
    )
    # The repository declares its languages in a script, which `datasets` no longer runs.
    commits = (
        hub(
            "bigcode/commitpackft",
            "commitpackft",
            take(50, None) if quick else take(5000, SHUFFLE_SEED),
            files=f"data/{language}/data.jsonl",
            filters=(EDITED,),
            effort="medium",
        )
        for language in LANGUAGES
    )
    edits = hub(
        "nuprl/EditPackFT",
        "editpackft",
        take(300, None) if quick else take(10_000, SHUFFLE_SEED),
        filters=(EDITED,),
        effort="medium",
    )
    return *code_act, *commits, edits


def _preferences(quick: bool) -> tuple[HubSource, ...]:
    return (
        hub("Anthropic/hh-rlhf", "hh_rlhf", take(300, None) if quick else take(20_000, SHUFFLE_SEED)),
        hub(
            "m-a-p/CodeFeedback-Filtered-Instruction",
            "code_feedback",
            take(200, None) if quick else take(10_000, SHUFFLE_SEED),
            filters=(LONG_ENOUGH,),
        ),
    )
