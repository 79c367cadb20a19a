"""The index of episodes: every line found again, chosen as asked."""

import json

import pytest

from posttrain.report.episodes import Choice, EpisodeIndex


def episode(number, step, score, ended="done", reason=None, task=None):
    return {
        "step": step, "place": number, "task": task or f"task-{number % 3}", "prompt": "p",
        "completion": f'an {number}. answer that says , "prompt_tokens": [ itself', "score": score,
        "parts": {"exact": 1.0}, "reason": reason, "ended": ended, "prompt_tokens": [1] * 50, "tokens": [2] * 50,
    }  # fmt: skip


ROWS = [
    episode(0, 1, 0.5),
    episode(1, 1, None, "length", "truncated"),
    episode(2, 1, 1.0),
    episode(3, 2, 0.0, "format"),
    episode(4, 2, 1.0),
    episode(5, 3, -0.5),
]


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4, "torn')
    found = EpisodeIndex(path)
    while found.read_on(100):
        pass
    return found


def test_every_line_is_found_again_without_its_tokens(index):
    tokens = ("prompt_tokens", "tokens")
    wanted = [{key: value for key, value in row.items() if key not in tokens} for row in ROWS]
    assert list(index.rows(list(range(len(index))))) == wanted
    assert index.of_task == {"task-0": [0, 3], "task-1": [1, 4], "task-2": [2, 5]}


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (Choice(), [5, 4, 3, 2, 1, 0]),
        (Choice(order="oldest"), [0, 1, 2, 3, 4, 5]),
        (Choice(order="best"), [2, 4, 0, 3, 5, 1]),
        (Choice(order="worst"), [5, 3, 0, 2, 4, 1]),
        (Choice(first_step=2), [5, 4, 3]),
        (Choice(first_step=2, last_step=2), [4, 3]),
        (Choice(outcome="unscorable"), [1]),
        (Choice(outcome="scored", ended="format"), [3]),
        (Choice(least=0.5), [4, 2, 0]),
        (Choice(least=-0.5, most=0.0), [5, 3]),
        (Choice(task="k-1"), [4, 1]),
    ],
)
def test_choices(index, choice, wanted):
    assert index.chosen(choice) == wanted


def test_answers_are_told_apart_by_dataset_and_id(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"id": "a", "dataset": d, "score": 1}) + "\n" for d in ("x", "y")))
    found = EpisodeIndex(path)
    found.read_on()
    assert found.of_task == {"x/a": [0], "y/a": [1]} and found.heads[0].step is None
