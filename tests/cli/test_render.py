"""`posttrain render`: what it prints, and what it says to bad input."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from posttrain.chat.harmony import DIFFERENCES
from posttrain.cli.main import main
from tests.chat.conftest import byte_level_definition
from tests.pipeline.command import posttrain

ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Hi [b]"},
        {"role": "assistant", "channel": "analysis", "content": "Hm."},
        {"role": "assistant", "channel": "final", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "channel": "final", "content": "Bye."},
    ]
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Render = Callable[..., Result]


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Render:
    """The command on a file with the given rows, each an object or a line of its own."""
    monkeypatch.chdir(tmp_path)

    def run(rows: list[Any], *words: str) -> Result:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path("rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return CliRunner().invoke(main, ["render", "rows.jsonl", *words], catch_exceptions=False)

    return run


HARMONY = ("--renderer", "harmony", "--model", "shipped:tiny")


def test_json_lines_hold_text_tokens_and_mask(render: Render) -> None:
    done = render([{"id": "a", "conversation": ROW}, ROW], *HARMONY, "--json", "--effort", "high")
    assert done.exit_code == 0, done.output
    samples = [json.loads(line) for line in done.output.splitlines()]
    assert [sample["row"] for sample in samples] == [1, 1, 2, 2]
    assert samples[:2] == [{**sample, "row": 1} for sample in samples[2:]]
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["loss_mask"])
        assert set(sample["loss_mask"]) == {0, 1}
        assert "Reasoning: high" in sample["text"]
    assert samples[0]["text"].endswith("final<|message|>Hello.<|return|>")


def test_without_json_a_person_sees_what_is_learned(render: Render) -> None:
    done = render([ROW], *HARMONY)
    assert done.exit_code == 0
    assert "row 1, sample 2 of 2: " in done.output
    assert done.output.count("⟦") == 2
    assert "⟦<|channel|>final<|message|>Bye.<|return|>⟧" in done.output
    assert "Hi [b]<|end|>" in done.output


def test_a_given_template_and_the_folders_own(render: Render, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(byte_level_definition(("<|im_start|>", "<|im_end|>")))
    where = ("--renderer", "template", "--model", "model")
    assert "has no chat template" in render([ROW], *where).output
    (tmp_path / "own.jinja").write_text(CHATML)
    done = render([ROW], *where, "--template", "own.jinja")
    assert done.output.count("⟦") == 2, done.output
    assert "assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user" in done.output
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    assert render([ROW], *where).output == done.output
    refused = render([ROW], *where, "--keep-reasoning")
    assert (refused.exit_code, "reads none of reasoning_content" in refused.output) == (2, True)


def test_the_document_shows_what_works(render: Render) -> None:
    document = (Path(__file__).parents[2] / "docs" / "chat-formats.md").read_text()
    [row] = re.findall(r"^```json\n(.*?)\n```$", document, flags=re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^    posttrain render (.*)$", document, flags=re.MULTILINE)
    assert len(commands) == 2
    for words in commands:
        [_, *options] = words.replace("path/to/model", "shipped:tiny").split()
        done = render([row], *options)
        assert done.exit_code == 0, done.output
        assert "Hello.<|return|>" in done.output
    assert all(f"| `{name}`: " in document for name in DIFFERENCES)
    assert document.count("-analysis`: ") + document.count("-parse`: ") == len(DIFFERENCES)


USER = {"role": "user", "content": "x"}
SAID = {"role": "assistant", "content": "y"}


def test_openais_messages_are_read_with_their_calls(render: Render) -> None:
    made = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"n": 1}'}}
    spoken = [USER, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "1", "content": "2"}]
    done = render([{"messages": [*spoken, SAID]}], *HARMONY)
    assert "⟦ to=functions.f<|channel|>commentary <|constrain|>json<|message|>" in done.output
    assert "<|start|>functions.f to=assistant<|channel|>commentary<|message|>2<|end|>" in done.output
    assert "⟦<|channel|>final<|message|>y<|return|>⟧" in done.output


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([], HARMONY, "rows.jsonl: there is no row in it"),
        ([ROW, "{"], HARMONY, "rows.jsonl row 2: not JSON"),
        ([ROW, ""], HARMONY, "rows.jsonl row 2: not JSON"),
        ([{"messages": [{"role": "user"}]}], HARMONY, "rows.jsonl row 1: messages[0].content: is empty"),
        ([{"messages": [{"role": "user", "channel": "final"}]}], HARMONY, "row 1: messages.0.content: Field required"),
        ([{"messages": []}], HARMONY, "rows.jsonl row 1: messages: is empty"),
        ([{"messages": 3}], HARMONY, "rows.jsonl row 1: messages"),
        ([{"conversation": ROW}], HARMONY, "rows.jsonl row 1: id: Field required"),
        ([["x"]], HARMONY, "rows.jsonl row 1: row: Input should be a valid dictionary"),
        ([{"messages": [USER]}], HARMONY, "rows.jsonl row 1: messages: the assistant says nothing in it"),
        ([{"messages": [USER, {**SAID, "train": False}]}], HARMONY, "row 1: nothing in it is learned"),
        ([{"id": "a", "conversation": {"messages": [USER, SAID]}}], HARMONY, "row 1: message 1 (assistant) has no"),
        ([ROW], ("--renderer", "gemma", "--model", "shipped:tiny"), "no special token <bos>"),
        ([ROW], ("--renderer", "harmony", "--model", "nowhere"), "--model nowhere: there is no such folder"),
        ([ROW], ("--renderer", "harmony", "--model", "."), "tokenizer.json does not exist"),
        ([ROW], ("--renderer", "chatml", "--model", "."), "'chatml' is not one of"),
        ([ROW], ("--renderer", "template", "--model", "shipped:tiny", "--date", "today"), "--date today: write it as"),
        ([ROW], ("--renderer", "template", "--model", "shipped:tiny", "--template", "no"), "--template no: cannot be"),
    ],
)
def test_bad_input_gives_one_error_and_exit_code_2(
    render: Render, rows: list[Any], words: tuple[str, ...], said: str
) -> None:
    refused = render(rows, *words)
    assert refused.exit_code == 2
    assert said in refused.output
    assert "Traceback" not in refused.output
    assert refused.output.count("error: ") + refused.output.count("Error: ") == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused = posttrain("render", "no.jsonl", *HARMONY, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: no.jsonl: cannot be read: No such file or directory\n"


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n"\xff"\n')
    refused = CliRunner().invoke(main, ["render", str(tmp_path / "rows.jsonl"), *HARMONY])
    assert refused.exit_code == 2
    assert "not UTF-8" in refused.output
