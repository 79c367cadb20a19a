"""What phases keep of their line files after a kill, and what they compute from them; numbers worked by hand."""

from pathlib import Path

import numpy as np

from posttrain.phases.evaluate import counts, means
from posttrain.phases.grpo import group_item
from posttrain.phases.loop import keep_rows_up_to
from posttrain.run.journal import append_lines, read_lines


def answer(dataset: str, score: float | None, **parts: float) -> dict:
    return {"dataset": dataset, "score": score, "parts": parts}


def test_rows_after_the_checkpoint_and_torn_lines_go_so_that_no_step_is_written_twice(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    append_lines(metrics, [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)])
    with open(metrics, "ab") as file:
        file.write(b'{"step": 4, "lo')
    keep_rows_up_to(metrics, 2)
    append_lines(metrics, [{"step": 3, "loss": 0.25}])
    assert list(read_lines(metrics)) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]
    assert metrics.read_bytes().count(b"\n") == 3


def test_what_could_not_be_scored_is_counted_and_left_out_of_the_mean() -> None:
    answers = [
        answer("repair", 1.0, hidden=1.0, format=1.0),
        answer("repair", 0.0, hidden=0.0, format=1.0),
        answer("repair", None),
        answer("tools", None),
    ]
    assert means(answers) == {"repair.score": 0.5, "repair.hidden": 0.5, "repair.format": 1.0}
    assert counts(answers) == {"repair.asked": 3, "tools.asked": 1, "repair.unscorable": 1, "tools.unscorable": 1}


def test_a_group_shares_its_prompt_and_only_sampled_tokens_are_targets() -> None:
    group = [
        {"prompt_tokens": [7, 8, 9], "tokens": [1, 2, 3], "sampled": [1, 0, 1], "score": 0.5},
        {"prompt_tokens": [7, 8, 9], "tokens": [4, 5], "sampled": [1, 1], "score": 0.0},
        {"prompt_tokens": [7, 8, 9], "tokens": [6], "sampled": [1], "score": None},
    ]
    item = group_item(group, diverges=False)
    assert item.prefix.tolist() == [7, 8, 9]
    assert [tokens.tolist() for tokens in item.tokens] == [[1, 2, 3], [4, 5], [6]]
    assert item.num_targets == 4 and item.size == 9
    # An unscorable member trains nothing.
    assert np.concatenate(item.targets).tolist() == [True, False, True, True, True, False]
    # A divergence holds what it sampled, and never what a tool said.
    held = group_item(group, diverges=True)
    assert np.concatenate(held.targets).tolist() == [True, False, True, True, True, True]
