"""Data of the `tui` curriculum: tool calls, agent trajectories and preferences, whole or for a quick test."""

from posttrain.recipe.types import Dataset, Differs, HubSource, TextLength
from posttrain.recipes._hub import dataset, hub, take

SHUFFLE_SEED = 42
LANGUAGES = ("python", "javascript", "go", "rust", "java", "typescript")
EDITED = Differs(kind="differs", first="old_contents", second="new_contents", at_most=8000)
LONG_ENOUGH = TextLength(kind="text_length", column="answer", at_least=100, at_most=None)


def tui_data(quick_test: bool, tool_tokens: int, agent_tokens: int, preference_tokens: int) -> tuple[Dataset, ...]:
    """`tool_calls`, `agent` and `preferences`; rows longer than their tokens are left out."""
    return (
        dataset("tool_calls", "conversations", _tool_calls(quick_test), tool_tokens),
        dataset("agent", "conversations", _agent(quick_test), agent_tokens),
        dataset("preferences", "pairs", _preferences(quick_test), preference_tokens),
    )


def _tool_calls(quick: bool) -> tuple[HubSource, ...]:
    # A quick test takes the first rows, so that only the beginning of a set is downloaded.
    glaive = hub("glaiveai/glaive-function-calling-v2", "glaive", take(500 if quick else None, None))
    xlam = hub("Salesforce/xlam-function-calling-60k", "xlam", take(200 if quick else None, None), optional=True)
    hermes = (
        hub("NousResearch/hermes-function-calling-v1", "hermes", take(150 if quick else None, None), files=files)
        for files in ("func-calling-singleturn.json", "func-calling.json")
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
