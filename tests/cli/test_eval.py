"""`posttrain eval` and `posttrain generate` on the tiny base and on a state of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from posttrain.cli.main import main
from posttrain.data.evaluation_sets import CODING_AGENT
from posttrain.scoring import toolchains

Invoke = Callable[..., Result]
SET = """\
{"id": "one", "prompt": "What is 2+2?", "expected_answer": "4", "category": "sums", "difficulty": "easy"}
{"id": "two", "prompt": "Say ok.", "expected_answer": "ok", "scorer": "exact", "category": "words"}
{"id": "three", "prompt": "Say no.", "expected_answer": "no", "scorer": "guess"}
"""
SHORT = ("--max-new-tokens", "12", "--device", "cpu", "--threads", "1")


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.jsonl").write_text(SET)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def test_a_model_folder_is_asked_and_its_answers_are_kept(invoke: Invoke, tmp_path: Path) -> None:
    words = ("eval", "shipped:tiny", "--set", "set.jsonl", *SHORT)
    done = invoke(*words, "--save-baseline", "first")
    assert done.exit_code == 0, done.output
    assert "left out: 1 rows: scorer: is 'guess'; there are exact, contains, numeric" in done.output
    folder = tmp_path / "runs" / "_evaluations" / "tiny-set"
    record = json.loads((folder / "evaluation.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(row["id"], row.get("category"), row["dataset"]) for row in answers] == [
        ("one", "sums", "set"),
        ("two", "words", "set"),
    ]
    # Rendered as a chat: the tiny base is a GPT-OSS.
    assert answers[0]["prompt"].endswith("<|start|>user<|message|>What is 2+2?<|end|><|start|>assistant")
    assert record["set"]["rows"] == 2 and record["counts"] == {"set.asked": 2}
    assert [line["group"] for line in record["scorecard"]][:3] == ["all", "category", "category"]
    before = (folder / "answers.jsonl").stat().st_mtime_ns
    again = invoke(*words)
    assert "is there already" in again.output and (folder / "answers.jsonl").stat().st_mtime_ns == before
    other = invoke(*words, "--temperature", "0.5")
    assert other.exit_code == 2 and "its sampling differ; give this one another --name" in other.output
    assert invoke(*words, "--overwrite").exit_code == 0
    assert [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()] == answers
    compared = invoke("report", "--before", "first", "--after", "tiny-set", "--gate")
    assert compared.exit_code == 0 and "Nothing changed: all 2 cases score the same." in compared.output


def test_several_samples_are_seeded_and_give_the_chance_that_one_of_k_is_right(invoke: Invoke, tmp_path: Path) -> None:
    words = ("eval", "shipped:tiny", "--set", "set.jsonl", *SHORT, "--samples", "3", "--temperature", "3")
    folder = tmp_path / "runs" / "_evaluations"
    texts = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert invoke(*words, "--name", name, "--seed", seed, "--pass-at", "1,2").exit_code == 0
        rows = [json.loads(line) for line in (folder / name / "answers.jsonl").read_text().splitlines()]
        texts[name] = [[sample["completion"] for sample in row["samples"]] for row in rows]
        assert {"pass@1", "pass@2"} <= rows[0]["parts"].keys()
    assert texts["a"] == texts["b"] != texts["c"]
    assert len(set(texts["a"][0])) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "shipped:tiny", "--set", "eval_v2"), "did you mean eval_v1"),
        (("eval", "nothing", "--set", "set.jsonl"), "there is no run 'nothing'"),
        (("eval", "shipped:tiny", "--set", "set.jsonl", "--state", "sft"), "--state goes with a run"),
        (("eval", "shipped:tiny", "--set", "set.jsonl", "--samples", "3"), "at temperature 0 are all the same"),
        (("eval", "shipped:tiny", "--set", "set.jsonl", "--pass-at", "2"), "needs several --samples"),
        (("eval", "shipped:tiny", "--set", "set.jsonl", "--name", "../x"), "--name '../x'"),
        (("eval", "shipped:tiny", "--set", "set.jsonl", "--threads", "0"), "--threads 0: must be at least 1"),
        (("generate", "--model", "shipped:tiny", "--prompts", "none.txt"), "none.txt: cannot be read"),
        (("generate", "--model", "shipped:tiny", "--prompts", "bad.jsonl"), "bad.jsonl row 1: not JSON"),
        (("generate", "--model", "shipped:tiny", "--prompts", "set.jsonl", "--output", "set.jsonl"), "not overwritten"),
    ],
)
def test_bad_input_exits_with_2(invoke: Invoke, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    refused = invoke(*words)
    assert refused.exit_code == 2 and said in refused.output
    assert not (tmp_path / "runs").exists()


def test_generate_answers_lines_and_records(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("What is 2+2?\n\nSay ok.\n")
    plain = invoke("generate", "--model", "shipped:tiny", "--prompts", "p.txt", *SHORT)
    assert plain.exit_code == 0, plain.output
    rows = [json.loads(line) for line in plain.stdout.splitlines()]
    assert [row["id"] for row in rows] == ["1", "2"]
    assert rows[0]["prompt"].endswith("<|message|>What is 2+2?<|end|><|start|>assistant")
    assert rows[0]["completion"] and rows[0]["new_tokens"] <= 12
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say ok."}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "x", "messages": messages}) + "\n")
    words = ("generate", "--model", "shipped:tiny", "--prompts", "p.jsonl", "--output", "out.jsonl", "--effort", "high")
    assert invoke(*words, *SHORT).exit_code == 0
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["id"] == "x" and "Be brief." in row["prompt"] and "Reasoning: high" in row["prompt"]


def test_the_coding_agents_six_targets_are_measured_on_its_set_and_on_a_tree_of_ones_own(invoke: Invoke) -> None:
    if lacks := toolchains.missing("python"):
        pytest.skip(lacks)  # names the tool and how to install it
    short = (*SHORT, "--limit", "2", "--max-turns", "1")
    done = invoke("eval", "shipped:tiny", "--set", "coding_agent", *short)
    assert done.exit_code == 0, done.output
    targets = [line for line in done.output.splitlines() if line.startswith("target:")]
    assert [line.split()[1] for line in targets] == [target.metric for target in CODING_AGENT.targets]
    assert not [line for line in targets if "not measured" in line]
    words = ("data", "mutate", "shipped:python", "--language", "python", "--output", "tasks.jsonl", "--limit", "2")
    assert invoke(*words).exit_code == 0
    own = invoke("eval", "shipped:tiny", "--set", "tasks.jsonl", *short)
    assert own.exit_code == 0 and own.output.count("target:") == 6, own.output
    other = invoke("eval", "shipped:tiny", "--set", "set.jsonl", *SHORT)
    assert "target:" not in other.output
