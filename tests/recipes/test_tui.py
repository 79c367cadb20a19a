"""`tui`: every number of the seed's tables, against the resolved recipe."""

import pytest

from posttrain.errors import RecipeError
from posttrain.phases.grpo import weights_of
from posttrain.recipe.load import find
from posttrain.recipe.types import Epochs, GrpoPhase, PreferencePhase, PreparePhase, Recipe, RowBatch, SftPhase, Skipped

# Batch, accumulation and sequence length of tool calling, agent, IPO and GRPO, as the seed's tables have them.
AGGRESSIVE = ((10, 5, 8192), (4, 6, 32768), (4, 8, 8192), (2, 8, 65536))
BALANCED = ((8, 6, 8192), (1, 24, 32768), (2, 16, 8192), (1, 16, 65536))
CONSERVATIVE = ((4, 12, 8192), (1, 24, 32768), (1, 32, 8192), (1, 16, 65536))
QUICK = ((2, 2, 4096), (1, 2, 4096), (1, 2, 4096), (1, 2, 4096))
NAMES = ("tool_sft", "agent_sft", "preference", "grpo")


def tui(**flags: object) -> Recipe:
    found = find("tui")
    return found.build({flag.name: flag.default for flag in found.flags} | flags)  # type: ignore[arg-type]


def phases(recipe: Recipe) -> tuple[SftPhase, SftPhase, PreferencePhase, GrpoPhase]:
    by_name = {phase.name: phase for phase in recipe.phases}
    return tuple(by_name[name] for name in NAMES)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("flags", "table"),
    [
        ({"batch_profile": "aggressive"}, AGGRESSIVE),
        ({}, BALANCED),
        ({"batch_profile": "balanced"}, BALANCED),
        ({"batch_profile": "conservative"}, CONSERVATIVE),
        ({"quick_test": True}, QUICK),
    ],
)
def test_every_number_of_a_profile_reaches_the_recipe(
    flags: dict[str, object], table: tuple[tuple[int, int, int], ...]
) -> None:
    recipe = tui(**flags)
    tool, agent, preference, grpo = phases(recipe)
    for phase, (batch, accumulation, sequence) in zip((tool, agent), table, strict=False):
        assert phase.batch == RowBatch(kind="rows", rows=batch * accumulation, row_tokens=sequence)
    assert preference.pairs_per_step == table[2][0] * table[2][1]
    assert grpo.groups_per_step == table[3][0] * table[3][1]
    for name, (batch, _, sequence) in zip(NAMES, table, strict=True):
        assert recipe.suggested.micro_batch_tokens[name] == batch * sequence
    (data,) = (phase for phase in recipe.phases if isinstance(phase, PreparePhase))
    longest = {dataset.name: dataset.max_tokens for dataset in data.datasets}
    assert (longest["tool_calls"], longest["agent"]) == (table[0][2], table[1][2])
    assert longest["preferences"] == table[2][2]
    assert longest["call_tasks"] + grpo.sampling.max_new_tokens == table[3][2]


def test_the_seeds_other_numbers() -> None:
    recipe = tui()
    tool, agent, preference, grpo = phases(recipe)
    assert [(one.trainable.rank, one.trainable.alpha) for one in (tool, agent)] == [(64, 128), (128, 256)]  # type: ignore[union-attr]
    assert [one.trainable.kind for one in (preference, grpo)] == ["continue", "continue"]
    assert [one.optimizer.learning_rate for one in (tool, agent, preference, grpo)] == [2e-5, 3e-5, 5e-7, 1e-6]
    assert [one.optimizer.clip_norm for one in (tool, agent, preference, grpo)] == [1.0, 0.5, 1.0, 1.0]
    for one in (tool, agent, preference, grpo):
        assert (one.optimizer.schedule, one.optimizer.warmup_share, one.optimizer.weight_decay) == (
            "cosine",
            0.05,
            0.01,
        )
    epochs = [one.steps.epochs for one in (tool, agent, preference) if isinstance(one.steps, Epochs)]
    assert (epochs, grpo.steps) == ([1, 3, 2], 5000)
    assert preference.objective.kind == "ipo" and preference.objective.beta == 0.1
    assert (grpo.group_size, grpo.sampling.temperature, grpo.sampling.max_new_tokens) == (4, 0.7, 1024)
    assert (recipe.seed, recipe.suggested.checkpoint_every_steps) == (42, 250)
    gates = {
        phase.name: [(gate.comparison, gate.threshold, gate.hard) for gate in phase.gates] for phase in recipe.phases
    }
    assert gates["tool_sft"] == [("<=", 2.0, True)] and gates["agent_sft"] == [("<=", 1.8, True)]
    assert gates["grpo"] == [(">", 0.55, False)] and all(hard for _, _, hard in gates["merge"])
    assert {gate.name for phase in recipe.phases if phase.name == "merge" for gate in phase.gates} >= {
        "size_ratio",
        "smoke_ok",
    }
    assert recipe.base.repo == "openai/gpt-oss-20b"  # type: ignore[union-attr]


def test_a_quick_test_ends_every_phase_after_50_steps_on_the_tiny_base() -> None:
    recipe = tui(quick_test=True)
    assert [phase.steps for phase in phases(recipe)] == [50] * 4
    assert recipe.base.path == "shipped:tiny"  # type: ignore[union-attr]
    # Thresholds of the 20B model do not stop the tiny one; the merged folder's completeness does.
    hard = {gate.name for phase in recipe.phases for gate in phase.gates if gate.hard}
    assert hard == {"size_ratio", "missing_tensors", "unexpected_tensors"}


def test_grpo_left_out_keeps_its_place_and_says_why() -> None:
    assert phases(tui(grpo=False))[3].steps == Skipped(kind="skipped", reason="--no-grpo was given")


def test_tasks_of_ones_own_are_played_beside_recorded_calls() -> None:
    recipe = tui(task_file="mine.jsonl")
    grpo = phases(recipe)[3]
    (data,) = (phase for phase in recipe.phases if isinstance(phase, PreparePhase))
    [tasks] = [dataset for dataset in data.datasets if dataset.name == grpo.dataset]
    assert [source.format for source in tasks.sources] == ["xlam", "hermes", "hermes", "code_task"]  # type: ignore[union-attr]
    assert (grpo.sampling.max_turns, phases(tui())[3].sampling.max_turns) == (8, 1)
    assert weights_of(grpo.reward, "code") == {"reward": 1.0}
    assert weights_of(grpo.reward, "calls") == {"format": 0.1, "tool": 0.2, "exact": 0.7}
    assert weights_of({"exact": 1.0}, "code") == {"exact": 1.0}


def test_a_folder_or_a_name_on_the_hub_takes_the_place_of_the_base() -> None:
    assert tui(base="./model").base.kind == "folder" and tui(base="me/model").base.kind == "hub"


def test_a_suggestion_for_a_phase_that_is_not_there_is_a_fault() -> None:
    from posttrain.recipe.check import check

    recipe = tui()
    wrong = recipe.suggested.model_copy(update={"micro_batch_tokens": {"agent_sf": 1}})
    with pytest.raises(RecipeError, match=r"'agent_sf' is no training phase.*did you mean agent_sft"):
        check(recipe.model_copy(update={"suggested": wrong}))
