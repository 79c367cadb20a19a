"""Two evaluations beside each other: paired by id, the gate, groups, baselines; numbers worked by hand."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from posttrain.cli.main import main
from posttrain.errors import InputError, RunFolderError
from posttrain.report.baselines import find, names, save
from posttrain.report.delta import as_json, delta, markdown, regressions
from posttrain.report.scorecard import Target, against_targets, scorecard
from tests.report.runs import FakeRun, answer, evaluate


def evaluation(folder: Path, rows: list[dict], **record) -> Path:
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps({"set": {"name": "tools", "digest": "a" * 64}, **record}))
    return folder


def scores(values, **more) -> list[dict]:
    """Rows a, b, c and so on, in an order that is not that of the ids."""
    rows = [answer(f"case-{number:03d}", value, **more) for number, value in enumerate(values)]
    return rows[::-1]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    before = [1.0] * 60 + [0.0] * 40
    after = [1.0] * 40 + [0.0] * 20 + [1.0] * 5 + [0.0] * 35
    evaluation(tmp_path / "smoke" / "evaluations" / "before", scores(before))
    evaluation(tmp_path / "smoke" / "evaluations" / "after", scores(after)[::-1])
    evaluation(tmp_path / "_evaluations" / "folder-tools", scores(before))
    return tmp_path


def report(*words: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, words)], catch_exceptions=False)


def test_pairs_are_by_id_and_every_change_is_told(runs: Path) -> None:
    found = delta(find(runs, "smoke/before"), find(runs, "smoke/after"))
    [(row, pairs)] = found.scores()
    assert (row.dataset, pairs.pairs, pairs.improved, pairs.worsened) == ("tools", 100, 5, 20)
    assert pairs.difference == pytest.approx(-0.15)
    # Two-sided exact McNemar on 5 of 25 discordant pairs.
    assert pairs.mcnemar_p == pytest.approx(0.004077315330505371)
    told = as_json(found, [])
    changed = {case["id"]: case["after"] - case["before"] for case in told["changes"]}
    assert len(changed) == 25 and changed["case-040"] == -1 and changed["case-064"] == 1
    assert "60.0 % → 45.0 %" in markdown(found) and "| tools | case-059 |" in markdown(found)
    json.dumps(told, allow_nan=False)


def test_the_gate_fails_with_3_where_a_score_is_clearly_worse(runs: Path) -> None:
    words = ("--runs-dir", runs, "--before", "smoke/before", "--after", "smoke/after")
    assert report(*words).exit_code == 0
    failed = report(*words, "--gate")
    assert failed.exit_code == 3
    assert "60.0 % → 45.0 %, worse by 25.0 % of what it was" in failed.output
    assert report(*words, "--gate=30").exit_code == 0
    assert "--before smoke/after" not in failed.output
    assert report("--runs-dir", runs, "--before", "smoke/after", "--after", "smoke/before", "--gate").exit_code == 0


def test_a_loss_whose_interval_includes_0_or_that_is_small_is_no_regression(tmp_path: Path) -> None:
    noisy = [1.0, 0.0] * 10
    evaluation(tmp_path / "_evaluations" / "a", scores(noisy))
    evaluation(tmp_path / "_evaluations" / "b", scores([0.0, 1.0] * 4 + [0.0, 0.0] + noisy[10:]))
    [(_, pairs)] = (found := delta(find(tmp_path, "a"), find(tmp_path, "b"))).scores()
    assert pairs.difference == pytest.approx(-0.05) and not pairs.interval.below_zero
    assert regressions(found, 0.05) == [] == regressions(found, 0.0)
    evaluation(tmp_path / "_evaluations" / "c", scores([value * 100 + 100 for value in noisy]))
    evaluation(tmp_path / "_evaluations" / "d", scores([value * 100 + 96 for value in noisy]))
    found = delta(find(tmp_path, "c"), find(tmp_path, "d"))
    assert regressions(found, 0.05) == [] and len(regressions(found, 0.02)) == 1


def test_nothing_changed_says_so(runs: Path) -> None:
    found = delta(find(runs, "folder-tools"), find(runs, "smoke/before"))
    assert "Nothing changed: all 100 cases score the same." in markdown(found)
    assert "tools: no case has another score than before." in markdown(found)
    assert regressions(found, 0.0) == []


def test_what_is_left_out_or_differs_is_noted(tmp_path: Path) -> None:
    sampling = {"temperature": 0.0}
    evaluation(tmp_path / "_evaluations" / "a", scores([1.0, 0.0, None, 1.0]), sampling=sampling, seed=0)
    rows = [*scores([1.0, 1.0, 1.0, 1.0])[1:], answer("other", 1.0)]
    rows += [answer("case-000", 0.0), answer("x", 1.0, dataset="more")]
    folder = evaluation(tmp_path / "_evaluations" / "b", rows, sampling={"temperature": 0.2}, seed=0)
    with open(folder / "answers.jsonl", "a") as file:
        file.write('{"id": "torn')
    found = delta(find(tmp_path, "a"), find(tmp_path, "b"))
    assert list(found.notes) == [
        "The sampling differs: temperature 0.0 before, temperature 0.2 after.",
        "1 lines of b could not be read.",
        "On one side only, and not compared: more.",
        "tools: 2 cases are on one side only.",
        "tools: 1 cases are unscorable on a side and left out on both.",
        "tools: 1 ids come twice; the last one counts.",
    ]


def test_groups_are_compared_on_their_own(tmp_path: Path) -> None:
    def rows(values):
        groups = [("sums", "easy"), ("sums", "hard"), ("calls", "easy"), ("calls", "hard")]
        return [
            answer(str(number), value) | {"category": groups[number % 4][0], "difficulty": groups[number % 4][1]}
            for number, value in enumerate(values)
        ]

    evaluation(tmp_path / "_evaluations" / "a", rows([1, 0, 1, 0] * 5))
    evaluation(tmp_path / "_evaluations" / "b", rows([1, 1, 1, 0] * 5))
    found = delta(find(tmp_path, "a"), find(tmp_path, "b"))
    gains = {(group.by, group.value): group.comparison.difference for group in found.groups}
    assert gains == {
        ("category", "sums"): 0.5,
        ("category", "calls"): 0.0,
        ("difficulty", "easy"): 0.0,
        ("difficulty", "hard"): 0.5,
    }
    assert "| tools | category | sums | 50.0 % | 100.0 % | +50.0 points |" in markdown(found)


def test_chances_of_one_in_k_are_paired_like_any_part(tmp_path: Path) -> None:
    for name, values in (("a", [0.2, 0.4]), ("b", [0.4, 1.0])):
        evaluation(
            tmp_path / "_evaluations" / name,
            [
                answer(str(n), value, **{"pass@1": value, "pass@4": min(1.0, 2 * value)})
                for n, value in enumerate(values)
            ],
        )
    found = delta(find(tmp_path, "a"), find(tmp_path, "b"))
    by_part = {row.part: row.cells[-1].against_base.difference for row in found.tables["tools"]}
    assert by_part == pytest.approx({"pass@1": 0.4, "pass@4": 0.3})


def test_a_baseline_is_a_copy_that_outlives_its_run_and_is_never_replaced(runs: Path) -> None:
    source = runs / "smoke" / "evaluations" / "before"
    place = save(runs, "main", source)
    assert save(runs, "main", source) == place
    with pytest.raises(RunFolderError, match="'main' is another evaluation"):
        save(runs, "main", runs / "smoke" / "evaluations" / "after")
    with pytest.raises(InputError, match=r"baseline '../x'"):
        save(runs, "../x", source)
    (source / "answers.jsonl").unlink()
    assert len(find(runs, "main").evaluation.answers["tools"]) == 100
    assert names(runs) == ["folder-tools", "main", "smoke/after"]
    assert report("--runs-dir", runs, "--before", "main", "--after", "smoke/after", "--gate").exit_code == 3


def test_evaluation_phases_and_bare_files_can_be_compared_too(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "quickstart", [evaluate("eval_base", "base")])
    run.answers("eval_base", scores([0.0, 1.0]))
    bare = tmp_path / "mine.jsonl"
    bare.write_text("".join(json.dumps(row) + "\n" for row in scores([1.0, 1.0])))
    out = tmp_path / "delta.json"
    words = ("--runs-dir", tmp_path, "--before", "quickstart/eval_base", "--after", bare, "--output", out)
    assert report(*words).exit_code == 0
    [metric] = json.loads(out.read_text())["metrics"]
    assert (metric["difference"], metric["pairs"], metric["verdict"]) == (0.5, 2, "no clear change")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a RUN, or two evaluations"),
        (("--before", "smoke/before"), "give a RUN, or two evaluations"),
        (("smoke", "--gate"), "a RUN has a report of its own"),
        (("--before", "smoke/befor", "--after", "smoke/after"), "did you mean smoke/before"),
        (("--before", "smoke/before", "--after", "smoke/other"), "have no set in common"),
        (("--before", "smoke/before", "--after", "smoke/after", "--output", "x.html"), "must end in .md or .json"),
        (("--before", "smoke/before", "--after", "smoke/after", "--gate=much"), "'much' is not a valid float"),
        (("--before", "../../nowhere/passwd", "--after", "smoke/after"), "there is no evaluation"),
    ],
)
def test_bad_input(runs: Path, words: tuple[str, ...], said: str) -> None:
    evaluation(runs / "smoke" / "evaluations" / "other", scores([1.0], dataset="sums"))
    refused = report(*words, "--runs-dir", runs)
    assert refused.exit_code == 2 and said in refused.output


def test_scorecard_groups_easy_before_hard_and_leaves_the_unscorable_out() -> None:
    rows = [
        answer(str(n), score, exact=score or 0.0) | {"category": category, "difficulty": difficulty, "turns": n}
        for n, (score, category, difficulty) in enumerate(
            [(1.0, "sums", "hard"), (0.0, "sums", "easy"), (None, "calls", "easy"), (0.5, "calls", "easy")]
        )
    ]
    lines = scorecard(rows)
    assert [(line.group, line.value, line.asked, line.unscorable, line.score, line.full) for line in lines] == [
        ("all", "", 4, 1, 0.5, 1),
        ("category", "calls", 2, 1, 0.5, 0),
        ("category", "sums", 2, 0, 0.5, 1),
        ("difficulty", "easy", 3, 1, 0.25, 0),
        ("difficulty", "hard", 1, 0, 1.0, 1),
        ("category, difficulty", "calls, easy", 2, 1, 0.5, 0),
        ("category, difficulty", "sums, easy", 1, 0, 0.0, 0),
        ("category, difficulty", "sums, hard", 1, 0, 1.0, 1),
    ]
    targets = [Target("exact", ">=", 0.5), Target("turns", "<=", 1), Target("lint", ">=", 0.8)]
    verdicts = [(reached.value, reached.verdict) for reached in against_targets(lines, targets)]
    assert verdicts == [(0.5, "met"), (1.5, "missed"), (None, "not measured")]
