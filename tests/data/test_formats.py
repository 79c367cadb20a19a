"""Each row format on rows in its source's true schema, against conversations written by hand."""

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat.coding_agent import PROMPT
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.formats.code_feedback import STALL
from posttrain.data.formats.decision_table import prompt as decision_prompt
from posttrain.data.formats.format import BadRow
from posttrain.data.formats.table import FORMATS, fitting
from posttrain.data.rows import SHAPES, Row, checked
from posttrain.data.sources import read_source
from posttrain.errors import DataError
from posttrain.recipe.types import DecisionTableSource, RowFormat
from posttrain.recipes._sft_rl_data import sft_rl_data
from posttrain.recipes._tui_data import tui_data
from posttrain.recipes.quickstart import CHAT
from posttrain.run.folder import ASSETS
from posttrain.worlds.registry import start
from tests.data.sources import EVERY_ROW, FIXTURES, HUB, file, hub, read, said

KEYS = (
    "role", "content", "from", "value", "name", "arguments", "function", "tool_calls", "type", "text", "label", "i",
    "parameters", "properties", "messages", "conversations", "tools", "system", "thinking", "meta", "prompt", "answer",
    "reward_action_1", "q_action_0", "optimal_action", "lang", "new_file",
)  # fmt: skip
PIECES = (
    "user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "USER: a", "ASSISTANT: b",
    "\n\nHuman: a\n\nAssistant: b", "<tool_call>{}</tool_call>", "<functioncall> {", "#### 3", "[]", "{}", "[{}]", "A",
    '[{"name": "f", "arguments": {}}]', '{"name": "f", "parameters": 3}', "<execute>x</execute>", "system: x", "1e999",
)  # fmt: skip


@pytest.fixture(autouse=True)
def mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(HUB))


def test_the_table_has_every_format_of_the_recipe_types() -> None:
    assert {*FORMATS, "rows"} == set(get_args(RowFormat))
    assert all(set(made.makes) <= SHAPES.keys() and made.columns and made.reads for made in FORMATS.values())


def test_glaive() -> None:
    rows, faults = read(hub("glaiveai/glaive-function-calling-v2", "glaive"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "When is high tide in O'Brien's Bay?"),
        ("assistant", "get_tide", '{"harbour":"O\'Brien\'s Bay"}'),
        ("tool", "get_tide", '{"time": "14:20"}'),
        ("assistant", "final", "High tide is at 14:20."),
        ("user", "Thanks!"),
        ("assistant", "final", "Gladly."),
    ]
    assert rows[0].conversation.instructions is None
    assert [tool.name for tool in rows[0].conversation.tools] == ["get_tide", "get_wind"]
    assert rows[0].conversation.tools[0].parameters["properties"]["harbour"]["description"] == "Its name"
    assert rows[1].conversation.instructions == "You are a helpful assistant, with no access to external functions."
    assert said(rows[1].conversation) == [("user", "Name a prime number."), ("assistant", "final", "Seven is one.")]
    assert rows[0].id == "glaiveai/glaive-function-calling-v2:train:1"
    assert len(faults) == 1 and faults[0].startswith("row 3: system: has a function that is not JSON")


def test_xlam() -> None:
    rows, faults = read(hub("Salesforce/xlam-function-calling-60k", "xlam"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "Convert 3 miles to km and list the two largest of 4, 9, 1."),
        ("assistant", "convert", '{"value":3,"to":"km"}'),
        ("assistant", "largest", '{"values":[4,9,1],"count":2}'),
    ]
    convert, largest = rows[0].conversation.tools
    assert convert.parameters == {
        "type": "object",
        "properties": {
            "value": {"type": "number", "description": "The distance."},
            "to": {"type": "string", "description": "The unit.", "default": "m"},
        },
        "required": ["value"],
    }
    assert largest.parameters["properties"]["values"] == {
        "type": "array",
        "items": {"type": "integer"},
        "description": "Numbers.",
    }
    assert largest.parameters["required"] == ["values"]
    assert rows[1].conversation.tools[0].parameters["required"] == []
    assert faults == ["row 3: answers: calls 'dial', which is not among the tools"]


def test_hermes() -> None:
    repo = "NousResearch/hermes-function-calling-v1"
    rows, faults = read(hub(repo, "hermes", "func_calling_singleturn"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "How do I make dal?"),
        ("assistant", "find_recipe", '{"dish":"dal"}'),
    ]
    assert rows[0].conversation.instructions is None
    assert [tool.name for tool in rows[0].conversation.tools] == ["find_recipe"]
    assert len(faults) == 1 and faults[0].startswith("row 2: conversations[2].value: is not JSON")
    rows, _ = read(hub(repo, "hermes", "func_calling"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "Dal and naan?"),
        ("assistant", "commentary", "I will look for both."),
        ("assistant", "find_recipe", '{"dish":"dal"}'),
        ("assistant", "find_recipe", '{"dish":"naan"}'),
        ("tool", "find_recipe", '{"minutes":40}'),
        ("tool", "find_recipe", '{"minutes":25}'),
        ("assistant", "final", "Dal takes 40 minutes, naan 25."),
    ]
    rows, _ = read(hub(repo, "hermes", "json_mode_singleturn"), "conversations")
    assert rows[0].conversation.instructions == 'Answer in JSON with this schema: {"n": "integer"}'
    assert said(rows[0].conversation) == [("user", "Two and two."), ("assistant", "final", '{"n": 4}')]


def test_code_act() -> None:
    rows, faults = read(
        hub("xingyaoww/code-act", "code_act", split="codeact", reasoning_effort="high"), "conversations"
    )
    assert said(rows[0].conversation) == [
        ("user", "What is the sum of 1 to 10?"),
        ("assistant", "analysis", "I add them up."),
        ("assistant", "execute", '{"code":"print(sum(range(1, 11)))"}'),
        ("tool", "execute", "55"),
        ("assistant", "final", "The sum is 55."),
    ]
    assert rows[0].conversation.instructions == PROMPT and rows[0].conversation.reasoning_effort == "high"
    assert faults == ["row 2: conversations[2].content: is empty"]
    rows, _ = read(hub("xingyaoww/code-act", "code_act", split="general"), "conversations")
    assert said(rows[0].conversation)[-1] == ("assistant", "final", "The path is longer then.")
    assert rows[0].conversation.tools == () and len(rows[0].conversation.messages) == 4


def test_commitpackft() -> None:
    source = hub("bigcode/commitpackft", "commitpackft", files="data/python/data.jsonl")
    rows, faults = read(source, "conversations")
    assert said(rows[0].conversation) == [
        ("user", "Use pi in place of 3\n\n`area.py` is:\n\n```python\ndef area(r):\n    return 3 * r * r\n```"),
        ("assistant", "final", "```python\nimport math\n\n\ndef area(r):\n    return math.pi * r * r\n```"),
    ]
    assert rows[0].conversation.instructions == PROMPT
    assert said(rows[3].conversation)[0] == ("user", "Add area\n\n`area.py` does not exist yet.")
    assert rows[0].id == "bigcode/commitpackft/data/python/data.jsonl:train:1" and not faults


def test_editpackft() -> None:
    rows, faults = read(hub("nuprl/EditPackFT", "editpackft"), "conversations")
    assert said(rows[0].conversation)[0][1].startswith("Use the constant pi of the standard library.\n\n`area.py` is:")
    assert faults == ["row 2: instruction: is empty"]


def test_a_fence_is_longer_than_those_in_the_code() -> None:
    record = {"old_contents": "", "new_contents": "```\nx\n```", "message": "m", "subject": "s"}
    made = FORMATS["commitpackft"].makes["conversations"](record)["conversation"]
    assert made.messages[-1].content == "````\n```\nx\n```\n````"


def test_hh_rlhf() -> None:
    rows, faults = read(hub("Anthropic/hh-rlhf", "hh_rlhf"), "pairs")
    assert said(rows[0].prompt) == [("user", "Name a fruit."), ("assistant", "final", "A pear."), ("user", "Another?")]
    assert said(rows[0].chosen) == [("assistant", "final", "A plum.")]
    assert said(rows[0].rejected) == [("assistant", "final", "No.")]
    assert faults == [
        "row 2: rejected: is the same as chosen",
        "row 3: rejected: differs from chosen before the last answer",
    ]


def test_code_feedback() -> None:
    source = hub("m-a-p/CodeFeedback-Filtered-Instruction", "code_feedback")
    (row, short), _ = read(source, "pairs")
    answer = row.chosen[0].content
    assert said(row.prompt) == [("user", "Write a function that doubles a number.")] and len(answer) == 118
    # 30 % of 118 characters are 35.
    assert row.rejected[0].content == f"{answer[:35].rstrip()}\n\n{STALL}"
    assert short.rejected[0].content == f"Y\n\n{STALL}"
    (row, _), _ = read(source, "conversations")
    assert said(row.conversation) == [
        ("user", "Write a function that doubles a number."),
        ("assistant", "final", answer),
    ]


def test_code_task() -> None:
    rows, faults = read(file("code_tasks.jsonl", "code_task"), "tasks")
    fixed, written = rows
    assert said(fixed.prompt) == [
        ("user", "Make double return twice its argument.\n\nThe code is in solution.py, its tests in test_solution.py.")
    ]
    assert fixed.prompt.instructions == PROMPT and fixed.tier == "bug_fix"
    assert fixed.reference["tree"]["solution.py"] == "def double(n):\n    return n\n"
    assert fixed.reference["visible"] == [["double(2)", "4"], ["bool(double(0))", "False"]]
    # A function of tests, and code that is written from nothing.
    assert written.reference["visible"] == [["greet('you')", "'hi you'"]] and written.tier is None
    assert written.reference["tree"]["solution.py"].startswith("# Write")
    assert faults == [
        "row 3: tests: line 2 of the tests is no assert, so its outcome cannot be told apart",
        "row 4: language: is 'rust'; tasks of this shape are Python, others come from `data mutate`",
        "row 5: tests: hold no assert",
    ]
    # What is recorded solves it, what it begins with does not, and the tests that a model runs say the same.
    for row, solved in ((fixed, True), (written, True), (fixed, False)):
        environment = start(row.model_dump())
        if solved:
            environment.respond(list(row.solution))
        assert ("tests passed" in environment.run_tests()) == solved  # type: ignore[attr-defined]
        score = environment.score()
        assert score.parts["solved"] == solved and score.parts["reward"] == (1.0 if solved else -1.0), score


def test_gsm8k() -> None:
    rows, faults = read(hub("openai/gsm8k", "gsm8k", "main"), "tasks")
    assert said(rows[0].prompt) == [("user", "A box holds 12 eggs. How many eggs are in 100 boxes?")]
    assert rows[0].reference == {"kind": "number", "answer": 1200.0, "tolerance": 0.01}
    assert faults == ["row 3: answer: has no number behind `####`"]
    environment = start(rows[0].model_dump())
    environment.respond(list(rows[0].solution))
    assert environment.score().value == 1.0
    rows, _ = read(hub("openai/gsm8k", "gsm8k", "main"), "conversations")
    assert said(rows[1].conversation)[1] == ("assistant", "final", "3 - 1 = <<3-1=2>>2\n#### 2")


def test_arc() -> None:
    rows, faults = read(hub("allenai/ai2_arc", "arc", "ARC-Easy"), "tasks")
    asked = "Which of these is a metal?\n\nA. wood\nB. iron\nC. wool\n\nAnswer with the letter alone."
    assert said(rows[0].prompt) == [("user", asked)]
    assert rows[0].reference == {"kind": "choice", "answer": "B", "choices": ["A", "B", "C"]}
    assert faults == ["row 2: answerKey: is '3'; the choices are 1, 2"]
    rows, _ = read(hub("allenai/ai2_arc", "arc", "ARC-Challenge"), "conversations")
    assert said(rows[0].conversation) == [("user", asked), ("assistant", "final", "B")]


def test_smoltalk() -> None:
    rows, _ = read(hub("HuggingFaceTB/smol-smoltalk", "smoltalk"), "conversations")
    assert rows[0].conversation.instructions == "Be brief."
    assert said(rows[0].conversation) == [("user", "What is tea?"), ("assistant", "final", "Leaves in hot water.")]
    assert rows[1].conversation.metadata == {"source": "everyday-conversations"}


def test_messages() -> None:
    rows, faults = read(file("messages.jsonl", "messages"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "Light on in the hall."),
        ("assistant", "analysis", "One call is enough."),
        ("assistant", "commentary", "One moment."),
        ("assistant", "set_light", '{"room":"hall","on":true}'),
        ("tool", "set_light", "ok"),
        ("assistant", "final", "It is on."),
    ]
    assert rows[0].conversation.instructions == "Use the tool."
    assert [tool.name for tool in rows[0].conversation.tools] == ["set_light"]
    assert said(rows[1].conversation) == [
        ("user", "Hi"),
        ("assistant", "final", "Hello", "(context)"),
        ("user", "Bye"),
        ("assistant", "final", "See you"),
    ]
    assert said(rows[2].conversation)[0] == ("user", "Bare list?")
    assert faults == [
        "row 4: messages[1].role: is 'robot'; system, developer, user, assistant and tool are known",
        "row 5: messages: the assistant says nothing in it",
    ]


def test_sharegpt() -> None:
    rows, faults = read(file("sharegpt.jsonl", "sharegpt"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "Is it raining in Bergen?"),
        ("assistant", "weather", '{"city":"Bergen"}'),
        ("tool", "weather", '{"rain": true}'),
        ("assistant", "final", "It is."),
    ]
    assert rows[0].conversation.instructions == "Ask the tool." and rows[1].conversation.instructions == "Rhyme."
    assert faults[0].startswith("row 3: conversations[0].from: is 'narrator'; known: human, user, gpt")


def test_alpaca() -> None:
    rows, faults = read(file("alpaca.jsonl", "alpaca"), "conversations")
    assert said(rows[0].conversation) == [("user", "Sort the numbers.\n\n3 1 2"), ("assistant", "final", "1 2 3")]
    assert said(rows[1].conversation) == [("user", "Greet me."), ("assistant", "final", "Hello!")]
    assert faults == ["row 3: output: is missing"]


def test_rt_traces() -> None:
    rows, _ = read(file("traces.jsonl", "rt_trace"), "conversations")
    assert said(rows[0].conversation) == [
        ("user", "What is 7 times 8?"),
        ("assistant", "analysis", "Seven eights."),
        ("assistant", "analysis", "7 × 8 = 56"),
        ("assistant", "final", "56"),
    ]
    assert rows[0].conversation.metadata["trace"]["meta"] == {"source": "own", "game": "sums"}


TRACE = {"trace_version": "1.0", "prompt": "p", "final_answer": "f", "steps": [{"i": 1, "type": "t", "content": "c"}]}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"prompt": "p" * 50_001}, "prompt: has 50001 characters; at most 50000 are allowed"),
        ({"final_answer": "f" * 50_001}, "final_answer: has 50001 characters; at most 50000 are allowed"),
        ({"steps": []}, "steps: is empty"),
        ({"steps": TRACE["steps"] * 1001}, "steps: has 1001 steps; at most 1000 are allowed"),
        ({"steps": TRACE["steps"] * 2}, "steps: has the same `i` twice"),
        ({"steps": [TRACE["steps"][0], {"i": 3, "type": "t", "content": "c"}]}, "steps: `i` does not count up by one"),
        ({"steps": [{"i": 2, "type": "t", "content": "c"}]}, "steps: `i` does not count up by one from 0 or 1"),
        ({"steps": [{"i": 1, "type": "t", "content": "c" * 20_001}]}, "steps[0].content: has 20001 characters"),
        ({"steps": [{"i": "1", "type": "t", "content": "c"}]}, "steps[0].i: is text, not a number"),
        ({"meta": [1]}, "meta: is a list, not an object"),
    ],
)
def test_a_trace_beyond_the_limits_is_named(tmp_path, changed, fault) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(TRACE | changed) + "\n")
    _, faults = read(file(path, "rt_trace"), "conversations")
    assert len(faults) == 1 and faults[0].startswith(f"row 1: {fault}")


def table(path: str = "decisions.csv", tau: float = 0.05) -> DecisionTableSource:
    return DecisionTableSource(
        kind="decision_table",
        path=str(FIXTURES / path),
        tau=tau,
        filters=(),
        selection=EVERY_ROW,
        reasoning_effort=None,
    )


def test_decision_table() -> None:
    rows, _ = read(table(), "tasks")
    assert rows[0].prompt.instructions == "You run a cold store.\nAnswer with an action such as [2]."
    assert said(rows[0].prompt) == [("user", "It is night.\nCO2 is low.")]
    assert said(rows[1].prompt) == [("user", "Store is full, CO2 is high.")]
    # Q - max Q is -.2, -.15, -.1, 0; over .05 that is e^-4, e^-3, e^-2, 1, and these sum to 1.2034.
    assert rows[0].reference["rewards"] == pytest.approx([0.0152194, 0.0413707, 0.1124572, 0.8309527], abs=1e-7)
    assert sum(rows[1].reference["rewards"]) == pytest.approx(1.0)
    assert rows[0].reference["q_values"] == [1.0, 1.05, 1.1, 1.2]
    assert rows[0].prompt.metadata == {"timestep": "0", "timestamp": "2025-05-05 00:00"}
    assert said(rows[0].solution) == [("assistant", "final", "[3]")]


@pytest.mark.parametrize(
    ("written", "instructions", "spoken"),
    [
        ("Just this.", None, ["Just this."]),
        ("system: a\nb\nuser: c", "a\nb", ["c"]),
        ("USER: a\n  User: b", None, ["a", "b"]),
        ("user: see system: on", None, ["see system: on"]),
    ],
)
def test_lines_of_a_decision_prompt_switch_the_role(written: str, instructions: str | None, spoken: list[str]) -> None:
    made = decision_prompt(written)
    assert made.instructions == instructions and [message.content for message in made.messages] == spoken


@pytest.mark.parametrize(
    ("header", "line", "fault"),
    [
        ("prompt,q_action_0,q_action_2", "a,1,2", "q_action_N: needs columns numbered 0, 1, … without a gap"),
        ("prompt,q_action_0", "a,1", "q_action_N: needs columns numbered 0, 1, … without a gap"),
        ("prompt,q_action_0,q_action_1", "a,1,high", "q_action_1: is 'high', not a number"),
        ("prompt,q_action_0,q_action_1", "a,1,nan", "q_action_1: is nan, not finite"),
        ("prompt,q_action_0,q_action_1,reward_action_0", "a,1,2,.5", "reward_action_0: is there already"),
        ("prompt,q_action_0,q_action_1,optimal_action", "a,1,2,0", "optimal_action: is 0, but action 1 has the"),
        (
            "prompt,q_action_0,q_action_1,optimal_action",
            "a,1,2,7",
            "optimal_action: is '7'; there are the actions",
        ),
        ("prompt,q_action_0,q_action_1", '" ",1,2', "prompt: is empty"),
    ],
)
def test_a_faulty_line_of_a_table_is_named(tmp_path, header: str, line: str, fault: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "table.csv"
    path.write_text(f"{header}\n{line}\n")
    _, faults = read(table(str(path)), "tasks")
    assert len(faults) == 1 and faults[0].startswith(f"row 1: {fault}")


# ---------------------------------------------------------------- TRL's shapes


def trl(name: str, row_format: RowFormat, content: str = "conversations"):  # type: ignore[no-untyped-def]
    rows, faults = read(file(f"trl/{name}.jsonl", row_format), content)
    assert not faults
    return rows


def test_trl_language_modeling() -> None:
    assert trl("language_modeling", "text", "text")[0].text == "The sky is blue."


def test_trl_language_modeling_conversational() -> None:
    (row,) = trl("language_modeling_conversational", "messages")
    assert said(row.conversation) == [("user", "What colour is snow?"), ("assistant", "final", "White.")]


def test_trl_prompt_only() -> None:
    (row,) = trl("prompt_only", "prompt_only", "tasks")
    assert said(row.prompt) == [("user", "The grass is")]
    score = start(row.model_dump()).score()
    assert score.value is None and score.reason == "the task has no reference answer"


def test_trl_prompt_only_conversational() -> None:
    (row,) = trl("prompt_only_conversational", "prompt_only", "tasks")
    assert said(row.prompt) == [("user", "What colour is grass?")]
    environment = start(row.model_dump())
    environment.respond(list(row.solution))
    assert environment.score().value == 1.0


def test_trl_prompt_completion() -> None:
    (row,) = trl("prompt_completion", "prompt_completion")
    assert said(row.conversation) == [("user", "The grass is"), ("assistant", "final", " green.")]


def test_trl_prompt_completion_conversational() -> None:
    (row,) = trl("prompt_completion_conversational", "prompt_completion")
    assert row.conversation.instructions == "Be brief."
    assert said(row.conversation) == [
        ("user", "Hi"),
        ("assistant", "final", "Hello", "(context)"),
        ("user", "What colour is grass?"),
        ("assistant", "final", "Green."),
    ]


def test_trl_preference() -> None:
    (row,) = trl("preference", "preference", "pairs")
    assert said(row.prompt) == [("user", "The grass is")]
    assert (row.chosen[0].content, row.rejected[0].content) == (" green.", " blue.")


def test_trl_preference_conversational_with_a_call() -> None:
    (row,) = trl("preference_conversational", "preference", "pairs")
    assert said(row.prompt) == [("user", "Light on in the hall.")] and row.prompt.tools[0].name == "set_light"
    assert said(row.chosen) == [("assistant", "set_light", '{"room":"hall","on":true}')]
    assert said(row.rejected) == [("assistant", "final", "Do it yourself.")]


def test_trl_preference_with_an_implicit_prompt() -> None:
    (row,) = trl("preference_implicit", "preference", "pairs")
    assert said(row.prompt) == [("user", "The grass is")]
    assert (row.chosen[0].content, row.rejected[0].content) == (" green.", " grey.")


def test_trl_preference_conversational_with_an_implicit_prompt() -> None:
    (row,) = trl("preference_implicit_conversational", "preference", "pairs")
    assert said(row.prompt) == [("user", "Grass?")]
    assert (row.chosen[0].content, row.rejected[0].content) == ("Green.", "Blue.")


def test_trl_unpaired_preference() -> None:
    liked, disliked = trl("unpaired_preference", "unpaired_preference")
    assert said(liked.conversation)[-1] == ("assistant", "final", " green.")
    assert said(disliked.conversation)[-1] == ("assistant", "final", " blue.", "(context)")


def test_trl_unpaired_preference_conversational() -> None:
    (row,) = trl("unpaired_preference_conversational", "unpaired_preference")
    assert said(row.conversation) == [("user", "Grass?"), ("assistant", "final", "Blue.", "(context)")]


def test_trl_stepwise_supervision() -> None:
    right, wrong = trl("stepwise_supervision", "stepwise")
    assert said(right.conversation)[-1] == ("assistant", "final", "0.8 is more than 0.11.\nSo 9.8 is more.")
    assert said(wrong.conversation)[-1][-1] == "(context)"


def test_trl_tool_calling() -> None:
    (row,) = trl("tool_calling", "messages")
    assert said(row.conversation) == [
        ("user", "Light on in the hall."),
        ("assistant", "set_light", '{"room":"hall","on":true}'),
        ("tool", "set_light", "It is on now."),
        ("assistant", "final", "Done!"),
    ]


# ---------------------------------------------------------------- what does not fit


def test_wrong_columns_name_the_formats_that_would_fit() -> None:
    with pytest.raises(DataError) as caught:
        list(read_source(file("alpaca.jsonl", "messages"), "conversations"))
    assert str(caught.value) == (
        "alpaca.jsonl: format 'messages' needs the column messages, but there are instruction, input, output; "
        "formats that fit them: alpaca"
    )
    assert fitting(["prompt", "completion", "label"])[0] == "unpaired_preference"
    assert fitting(["a"]) == []


def test_a_format_that_makes_other_content_is_named() -> None:
    with pytest.raises(DataError, match=r"'alpaca' makes conversations, not pairs; pairs come from rows, preference, "):
        read_source(file("alpaca.jsonl", "alpaca"), "pairs")


def test_the_documentation_lists_every_format_with_its_columns() -> None:
    text = (FIXTURES.parent.parent.parent / "docs" / "data.md").read_text()
    for name, made in FORMATS.items():
        columns = ", ".join(f"`{column}`" for column in made.columns)
        assert f"| `{name}` | {', '.join(made.makes)} | {columns} | {made.reads} |" in text


# ---------------------------------------------------------------- whatever the columns hold

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=8) | st.sampled_from(PIECES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, made in FORMATS.items() for content in made.makes]
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_values_become_a_row_or_a_named_fault(name: RowFormat, content: str, data: st.DataObject) -> None:
    record = {column: data.draw(VALUES) for column in FORMATS[name].columns}
    record |= data.draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
    try:
        fields = FORMATS[name].makes[content](record)
    except BadRow as bad:
        assert bad.field and bad.reason
        return
    row = checked({"id": "1", **fields}, content)
    assert isinstance(row, Row), (record, row)
    assert checked(json.loads(row.model_dump_json()), content) == row


def test_what_the_formats_make_can_be_rendered() -> None:
    tokenizer = Tokenizer.load(ASSETS / "tiny_base")
    render, trained = renderer(CHAT, tokenizer), 0
    datasets = (*tui_data(False, 1, 1, 1), *sft_rl_data(False, 1, 0))
    sources = [source for dataset in datasets for source in dataset.sources if dataset.content == "conversations"]
    for source in (*sources, file("messages.jsonl", "messages"), file("traces.jsonl", "rt_trace")):
        for row in read(source, "conversations")[0]:
            trained += sum(sum(sample.targets) for sample in render.samples(row.conversation))
    assert trained > 500
