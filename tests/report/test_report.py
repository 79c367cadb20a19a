"""The report of hand-made run folders: numbers worked by hand, tolerance of broken files, escaping, no torch."""

import html.parser
import json
import re
import subprocess
import sys

import pytest

from posttrain.report.comparison import evaluations, examples
from posttrain.report.document import command, document, output_digest
from posttrain.report.page import last_request, page, transcript, write_report
from posttrain.report.read import read_run
from posttrain.report.summary import summary_rows
from posttrain.report.text import cell, fenced, markdown
from posttrain.run.folder import RunFolder, digest_folder, files_below
from posttrain.run.lock import RunLock
from tests.report.rich import rich_run
from tests.report.runs import START, FakeRun, answer, evaluate, gate, phase, sha

VOID = {"meta", "br"}


class Wellformed(html.parser.HTMLParser):
    """Fails on a tag that is closed in the wrong place; collects the tags and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parsed(run):
    write_report(run)
    parser = Wellformed()
    parser.feed((run.path / "report.html").read_text())
    assert parser.open == []
    return parser


def words_of(run):
    return re.sub(r"\s+", " ", "".join(parsed(run).text))


@pytest.fixture
def three_states(tmp_path):
    """Base 1 of 4, sft 3 of 4, grpo 2 of 4; few-shot base 4 of 4; the export took sft."""
    phases = [
        evaluate("shots", "base", shots=2),
        evaluate("first", "base"),
        phase("sft", "sft", [gate("low", "loss", "<=", 1.0)], model="base", dataset="train"),
        evaluate("second", "sft"),
        phase("grpo", "grpo", model="sft", dataset="train"),
        evaluate("third", "grpo"),
        phase(
            "export",
            "export",
            candidates=[{"model": "sft", "evaluation": "second"}, {"model": "grpo", "evaluation": "third"}],
            metrics=["tools.exact"],
        ),
    ]
    made = FakeRun(tmp_path / "three", phases)
    scores = {"shots": "1111", "first": "1000", "second": "0111", "third": "0110"}
    for name, row in scores.items():
        rows = [answer(f"case-{at}", float(bit), exact=float(bit), style=0.5 + at / 8) for at, bit in enumerate(row)]
        made.answers(name, reversed(rows) if name == "second" else rows)
        made.complete(name, 5.0)
    made.steps("sft", [{"step": step, "loss": 3.0 - step / 10, "gradient_norm": 1.0} for step in range(1, 21)])
    made.complete("sft", 60.0, gates={"low": (0.9, True)})
    made.complete("grpo", 30.0)
    made.complete("export", 2.0, details={"chosen": "sft", "verification": [{"pair": "a / b", "status": "unverified"}]})
    return made


def test_before_is_the_zero_shot_base_and_after_is_what_was_exported(three_states):
    found = evaluations(read_run(three_states.run))
    assert found.before.phase == "first"
    assert found.after.phase == "second"
    assert [entry.phase for entry in found.zero_shot] == ["first", "second", "third"]
    assert [entry.phase for entry in found.few_shot] == ["shots"]


def test_gains_are_paired_by_id_against_base_and_against_the_state_before(three_states):
    (exact, style) = evaluations(read_run(three_states.run)).tables["tools"]
    assert (exact.part, exact.is_score, exact.share) == ("exact", True, True)
    base, sft, grpo = exact.cells
    assert [c.mean for c in exact.cells] == [0.25, 0.75, 0.5]
    assert base.against_base is None and base.against_previous is None
    assert (sft.against_base.difference, sft.against_base.improved, sft.against_base.worsened) == (0.5, 3, 1)
    assert (grpo.against_base.difference, grpo.against_base.improved, grpo.against_base.worsened) == (0.25, 2, 1)
    assert (grpo.against_previous.difference, grpo.against_previous.worsened) == (-0.25, 1)
    assert style.cells[1].against_base.unchanged and not style.share


def test_a_part_stands_for_the_score_only_where_it_is_clear_which(tmp_path):
    made = FakeRun(tmp_path / "zeros", [evaluate("first", "base")])
    made.answers("first", [answer(f"case-{at}", 0.0, format=0.0, exact=0.0) for at in range(3)])
    made.complete("first")
    assert [row.part for row in evaluations(read_run(made.run)).tables["tools"]] == ["score", "format", "exact"]
    export = phase("export", "export", candidates=[], metrics=["tools.exact"])
    made = FakeRun(tmp_path / "named", [evaluate("first", "base"), export])
    made.answers("first", [answer(f"case-{at}", 0.0, format=0.0, exact=0.0) for at in range(3)])
    made.complete("first")
    assert [(row.part, row.is_score) for row in evaluations(read_run(made.run)).tables["tools"]] == [
        ("exact", True),
        ("format", False),
    ]


def test_without_an_export_after_is_the_last_zero_shot_evaluation(three_states):
    three_states.run.phase("export").result.unlink()
    found = evaluations(read_run(three_states.run))
    assert found.chosen is None
    assert found.after.phase == "third"
    assert "Nothing has been exported yet." in words_of(three_states.run)


def test_an_unfinished_evaluation_is_in_no_table(three_states):
    three_states.run.phase("third").result.unlink()
    assert [entry.phase for entry in evaluations(read_run(three_states.run)).zero_shot] == ["first", "second"]


def test_examples_are_the_cases_that_moved(three_states):
    run = read_run(three_states.run)
    (group,) = examples(evaluations(run))
    assert {case.before.id for case in group.improved} == {"case-1", "case-2", "case-3"}
    assert [case.before.id for case in group.worsened] == ["case-0"]
    assert (group.num_improved, group.num_worsened, group.num_same) == (3, 1, 0)


def test_at_most_five_examples_and_the_largest_change_first(tmp_path):
    made = FakeRun(tmp_path / "many", [evaluate("first", "base"), evaluate("second", "sft")])
    made.answers("first", [answer(f"case-{at}", 0.0) for at in range(9)])
    made.answers("second", [answer(f"case-{at}", at / 10) for at in range(9)])
    for name in ("first", "second"):
        made.complete(name)
    (group,) = examples(evaluations(read_run(made.run)))
    assert [case.before.id for case in group.improved] == [f"case-{at}" for at in (8, 7, 6, 5, 4)]
    assert (group.num_improved, group.num_same) == (8, 1)


def test_unchanged_answers_are_said_to_be_unchanged(tmp_path):
    made = FakeRun(tmp_path / "same", [evaluate("first", "base"), evaluate("second", "sft")])
    for name, said in (("first", "a"), ("second", "b")):
        made.answers(name, [answer(f"case-{at}", at % 2, completion=said) for at in range(6)])
        made.complete(name)
    for told in (words_of(made.run), (made.run.path / "report.md").read_text()):
        told = re.sub(r"\s+", " ", told)
        assert "Nothing changed: all 6 cases score the same." in told
        assert "Nothing changed: all 6 cases score as before, 6 of them in other words." in told


def test_a_few_changed_cases_are_no_clear_change(tmp_path):
    made = FakeRun(tmp_path / "few", [evaluate("first", "base"), evaluate("second", "sft")])
    made.answers("first", [answer(f"case-{at}", 0.0) for at in range(100)])
    made.answers("second", [answer(f"case-{at}", float(at < 3)) for at in range(100)])
    for name in ("first", "second"):
        made.complete(name)
    (headline,) = document(read_run(made.run)).headline
    assert headline.comparison.interval.above_zero  # the bootstrap alone would call it better
    assert "no clear change, only 3 cases changed (exact McNemar p = 0.25)" in headline.sentence


def test_unscorable_and_one_sided_ids_are_counted_and_left_out(tmp_path):
    made = FakeRun(tmp_path / "gaps", [evaluate("first", "base"), evaluate("second", "sft")])
    made.answers("first", [answer("a", 0.0), answer("b", 1.0), answer("c", 1.0), answer("only", 1.0)])
    made.answers("second", [answer("a", 1.0), answer("b", None), answer("c", 1.0)])
    for name in ("first", "second"):
        made.complete(name)
    content = document(read_run(made.run))
    pairs = content.headline[0].comparison
    assert (pairs.pairs, pairs.before_mean, pairs.after_mean) == (2, 0.5, 1.0)
    assert (pairs.before_only, pairs.after_only, pairs.unscorable) == (1, 0, 1)
    counted = {count.what: (count.value, count.notable) for count in content.counts}
    assert counted["tools: ids on one side only"] == (1, True)
    assert counted["tools: unscorable on a side, left out on both"] == (1, True)


def test_what_a_model_wrote_is_never_markup(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="go()">&amp; </pre></div>'
    evil += "{{ 7*7 }} \x00\x1b[31m \ud800 `````` <|start|>"
    made = FakeRun(tmp_path / "evil", [evaluate("first", "base"), evaluate("second", "sft")])
    named = f"<i>{evil[:8]}"
    for name, score in (("first", 0.0), ("second", 1.0)):
        made.answers(name, [answer(named, score, completion=evil, prompt=evil + "<|call|>", **{"<b>part": 1.0})])
        made.complete(name, notes=["<u>note</u>"])
    parser = parsed(made.run)
    assert not {"script", "img", "i", "u"} & set(parser.tags)
    assert not [key for key, _ in parser.attributes if key.startswith("on") or key == "src"]
    text = "".join(parser.text)
    assert "<script>alert(1)</script>" in text and "{{ 7*7 }}" in text
    assert "\x00" not in text and "\N{SYMBOL FOR NULL}" in text
    told = (made.run.path / "report.md").read_text()
    assert "<u>" not in told and "&lt;u&gt;note" in told
    assert "```````text\n" + evil[:20] in told  # seven, one more than the six inside


def test_the_page_needs_no_other_file(tmp_path):
    parser = parsed(rich_run(tmp_path / "rich").run)
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert all(value.startswith("#") for key, value in parser.attributes if key == "href")
    targets = {value for key, value in parser.attributes if key == "id"}
    assert {value[1:] for key, value in parser.attributes if key == "href"} <= targets


def test_special_tokens_become_chips_and_the_rest_is_escaped():
    shown = str(transcript("<|start|>user<|message|>a < b<|end|><|start|>assistant"))
    chip = '<span class="token">&lt;|{}|&gt;</span>'
    assert shown == (
        chip.format("start") + "user" + chip.format("message") + "a &lt; b" + chip.format("end")
        + "<br>" + chip.format("start") + "assistant"
    )  # fmt: skip
    assert str(transcript("<|not a token|>")) == "&lt;|not a token|&gt;"


def test_the_last_request_is_the_last_user_message():
    prompt = "<|start|>user<|message|>one<|end|><|start|>user<|message|>two\n three<|end|><|start|>assistant"
    assert last_request(prompt) == "two three"
    assert last_request("plain text") == ""


def test_torn_and_missing_files_are_survived_and_counted(three_states):
    run = three_states.run
    three_states.answers("second", [{"no": "id"}], torn='{"id": "case-9", "da')
    three_states.append(run.phase("sft").metrics, [], torn='[1]\n{"step": 21, "lo')
    three_states.append(run.events, [], torn='{"time": 1')
    run.phase("third").answers.unlink()
    run.phase("grpo").result.write_text('{"phase": "gr')
    content = document(read_run(run))
    counted = {(count.place, count.what): count.value for count in content.counts if count.notable}
    assert counted[("second", "unreadable lines of answers.jsonl")] == 2
    assert counted[("sft", "unreadable lines of metrics.jsonl")] == 2
    assert counted[("grpo", "unreadable lines of result.json")] == 1
    assert counted[("run", "unreadable lines of events.jsonl")] == 1
    assert content.found.tables["tools"][0].cells[1].mean == 0.75
    parsed(run)


@pytest.mark.parametrize("left", [(), ("recipe.json",), ("recipe.json", "events.jsonl")])
def test_a_folder_with_next_to_nothing_still_has_a_report(tmp_path, left):
    made = FakeRun(tmp_path / "bare", [evaluate("first", "base"), phase("sft", "sft", model="base", dataset="d")])
    for file in made.run.path.iterdir():
        if file.name not in left:
            file.unlink()
    told = words_of(made.run)
    assert "No evaluation is complete" in told
    assert ("The run is not finished, phase first is next" in told) == bool(left)


def test_a_step_that_was_run_again_counts_as_it_was_run_last(tmp_path):
    made = FakeRun(tmp_path / "steps", [phase("sft", "sft", model="base", dataset="d")])
    made.steps("sft", [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 4.0}])
    (sft,) = read_run(made.run).phases
    assert [row["loss"] for row in sft.metrics] == [5.0, 4.0]


def statuses(run):
    return {record.name: record.status for record in read_run(run).phases}


def test_statuses_follow_the_journal_and_the_lock(tmp_path):
    names = ["done", "broken", "next"]
    made = FakeRun(tmp_path / "going", [phase("sft", name, model="base", dataset="d") for name in names])
    assert statuses(made.run) == dict.fromkeys(names, "not run")
    made.complete("done")
    made.start("broken")
    with RunLock(made.run):
        assert statuses(made.run) == {"done": "complete", "broken": "running", "next": "not run"}
    assert statuses(made.run)["broken"] == "stopped"  # nobody holds the run: it was killed
    made.event("failed", attempt=1, message="loss is not finite")
    assert statuses(made.run)["broken"] == "failed"
    made.event("attempt_started", attempt=2)
    made.event("phase_resumed", phase="broken")
    made.event("stopped", attempt=2, message="on request")
    assert statuses(made.run) == {"done": "skipped", "broken": "stopped", "next": "not run"}
    made.event("discarded", phase="broken", path="broken", reason="asked")
    assert statuses(made.run)["broken"] == "not run"


def test_a_failed_hard_gate_holds_until_it_is_accepted_for_this_result(tmp_path):
    gates = [gate("low", "loss", "<=", 0.5), gate("soft", "loss", "<=", 0.1, hard=False)]
    made = FakeRun(tmp_path / "gated", [phase("sft", "sft", gates, model="base", dataset="d")])

    def verdicts():
        (record,) = read_run(made.run).phases
        return record.status, [one.verdict for one in record.gates]

    assert verdicts() == ("not run", ["not judged", "not judged"])
    made.complete("sft", gates={"low": (0.7, False), "soft": (0.7, False)})
    assert verdicts() == ("failed gate", ["failed", "failed"])
    assert "A hard gate of phase sft did not pass (low)" in words_of(made.run)
    made.event("accepted", phase="sft", gate="low")
    assert verdicts() == ("complete", ["accepted", "failed"])
    made.complete("sft", gates={"low": (0.8, False), "soft": (0.7, False)})
    assert verdicts()[0] == "failed gate"  # the acceptance was of the result before


def test_summary_rows_name_time_metric_and_gates(three_states):
    rows = {row.phase: row for row in summary_rows(three_states.run)}
    assert list(rows) == ["shots", "first", "sft", "second", "grpo", "third", "export"]
    assert (rows["sft"].status, rows["sft"].time, rows["sft"].gates) == ("complete", "1 min 00 s", "1 passed")
    assert rows["sft"].key_metric == "loss 1.450 (mean of the last 10)"  # steps 11..20: 3 - 1.55
    assert rows["export"].key_metric == "took sft"
    made = FakeRun(three_states.run.path.parent / "g", [phase("sft", "s", [gate("low", "loss", "<=", 0.5)], model="b")])
    made.complete("s", gates={"low": (0.75, False)})
    assert summary_rows(made.run)[0].gates == "low failed (0.75, must be ≤ 0.5)"


def test_the_report_says_the_same_in_both_forms(tmp_path):
    run = rich_run(tmp_path / "rich").run
    told, marked = words_of(run), (run.path / "report.md").read_text()
    content = document(read_run(run))
    for metric in content.headline:
        assert metric.sentence in told
        assert cell(metric.sentence) in marked
    for name in ("data", "merged", "export"):
        assert name in told and f"| {name} |" in marked
    assert "unverified" in told and "unverified" in marked
    assert sha("merged") in marked and sha("merged")[:12] in told
    assert "ipo after step 22 of 60" in told and "ipo after step 22 of 60" in marked
    assert content.exported == (
        "Exported: grpo, the best of 3 candidates by the mean of "
        "tools-held.exact, repair-held.hidden, pairs-held.accuracy."
    )
    assert content.attempts[1]["outcome"] == "completed"  # the journal knows before the manifest


def test_lineage_runs_from_data_to_export_by_digest(tmp_path):
    node = document(read_run(rich_run(tmp_path / "rich").run)).lineage
    chain = []
    while True:
        chain.append((node.name, [made for made, _ in node.digests], [name for name, _ in node.data]))
        if not node.children:
            break
        (node,) = node.children
    assert chain == [
        ("shipped:tiny", ["base"], []),
        ("tools", ["adapter"], ["tools-train"]),
        ("merged", ["merged"], []),
        ("agent", ["adapter"], ["agent-train"]),
        ("ipo", ["adapter"], ["pairs-train"]),
        ("grpo", ["adapter"], ["repair-train"]),
        ("export", ["adapter", "hf", "gguf"], []),
    ]


def test_digest_of_an_output_folder_is_that_of_the_folder(tmp_path):
    made = FakeRun(tmp_path / "run", [phase("export", "export", candidates=[], metrics=[])])
    folder = made.run.phase("export").export("hf")
    for name in ("b.txt", "a/z.txt", "a.txt", "a-b/c.txt"):
        made.write(folder / name, name)
    outputs = [
        {"path": f"exports/hf/{file.relative_to(folder)}", "sha256": sha(file.read_text())}
        for file in files_below(folder)
    ]
    made.complete("export", outputs=sorted(outputs, key=lambda output: output["path"]))
    (record,) = read_run(made.run).phases
    assert output_digest(record, "exports/hf") == digest_folder(folder)


def test_the_command_repeats_the_flags(tmp_path):
    flags = {"quick": True, "merge_first": False, "rate": 0.5, "note": "it's", "limit": None}
    made = FakeRun(tmp_path / "run", [], flags=flags)
    assert command(read_run(made.run)) == (
        "posttrain run quickstart --quick --no-merge-first --rate=0.5 '--note=it'\\''s' --name=run-again"
    )


def test_rebuilding_gives_the_same_bytes_and_leaves_nothing_beside(tmp_path):
    run = rich_run(tmp_path / "rich").run
    before = {file.name for file in run.path.iterdir()}
    write_report(run)
    first = [(run.path / name).read_bytes() for name in ("report.html", "report.md")]
    write_report(run)
    assert [(run.path / name).read_bytes() for name in ("report.html", "report.md")] == first
    assert {file.name for file in run.path.iterdir()} == before | {"report.html", "report.md"}


def test_markdown_cells_and_fences_hold_anything():
    assert cell("a|b\n<i>`*_[x]") == "a\\|b &lt;i&gt;\\`\\*\\_\\[x\\]"
    assert next(iter(fenced("```` x"))) == "`````text"


def test_neither_page_nor_summary_imports_torch_and_the_summary_not_even_numpy(tmp_path):
    run = rich_run(tmp_path / "rich").run
    for statement, unwanted in (
        ("from posttrain.report.page import write_report; write_report(run)", ["torch", "transformers", "scipy"]),
        ("from posttrain.report.summary import summary_rows; summary_rows(run)", ["torch", "numpy", "jinja2"]),
    ):
        code = (
            "import sys; from pathlib import Path; from posttrain.run.folder import RunFolder; "
            f"run = RunFolder(Path({str(run.path)!r})); {statement}; "
            f"print([name for name in {unwanted!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_reading_changes_nothing(three_states):
    before = digest_folder(three_states.run.path)
    run = read_run(three_states.run)
    page(document(run)), markdown(document(run)), summary_rows(three_states.run)
    assert digest_folder(three_states.run.path) == before
    assert run.phase("shots").started == START
    assert json.loads(three_states.run.recipe.read_text())["recipe"]["phases"] == run.recipe["phases"]
    assert read_run(RunFolder(three_states.run.path.parent / "absent")).phases == ()
