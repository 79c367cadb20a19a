"""`posttrain data …` through the command line, on fixtures."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from posttrain.cli.main import main
from tests.data.sources import FIXTURES

TRACES = str(FIXTURES / "traces.jsonl")
TABLE = str(FIXTURES / "decisions.csv")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(FIXTURES / "hub"))


def data(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["data", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_add_list_and_verify(tmp_path: Path) -> None:
    assert "no dataset in" in data("list").stdout
    added = data("add", "sums@v1", TRACES)
    assert "sums@v1 built: 4 conversations rows, digest" in added.stdout and "format rt_trace" in added.stderr
    assert "is there already, with the same rows" in data("add", "sums@v1", TRACES).stdout
    lines = data("list").stdout.splitlines()
    assert len(lines) == 2 and lines[1].startswith("sums@v1  conversations     4  ")
    assert data("verify").stdout == "sums@v1: ok\n"
    with open(tmp_path / "registry/sums/v1/rows.jsonl", "a") as file:
        file.write("\n")
    broken = data("verify", "sums@v1", code=2)
    assert "rows.jsonl has changed since it was built" in broken.stdout and "1 fault found" in broken.stderr


def test_add_turns_q_values_into_rewards_once(tmp_path: Path) -> None:
    assert "2 tasks rows" in data("add", "tes@v1", TABLE, "--tau", "0.05").stdout
    row = json.loads((tmp_path / "registry/tes/v1/rows.jsonl").read_text().splitlines()[0])
    assert row["reference"]["rewards"][3] == pytest.approx(0.8309527, abs=1e-7)
    assert "never overwritten" in data("add", "tes@v1", TABLE, "--tau", "0.1", code=2).stderr
    rewarded = tmp_path / "rewarded.csv"
    rewarded.write_text("prompt,q_action_0,q_action_1,reward_action_0,reward_action_1\na,1,2,0.25,0.75\n")
    assert "is there already" in data("add", "r@1", rewarded, "--tau", "0.05", code=2).stderr
    data("add", "r@1", rewarded)
    row = json.loads((tmp_path / "registry/r/1/rows.jsonl").read_text())
    assert row["reference"] == {"rewards": [0.25, 0.75], "q_values": [1.0, 2.0]}


def test_build_selects_after_filters_and_says_what_came_short() -> None:
    data("add", "all@1", TRACES)
    game = "conversation.metadata.trace.meta.game=high_card_duel"
    built = data("build", "duels@1", "--from", "all@1", "--filter", game, "--limit", "2", "--select", "latest")
    assert "duels@1 built: 2 conversations rows, 1 filtered" in built.stdout
    short = data("build", "duels@2", "--from", "all@1", "--filter", game, "--limit", "9")
    assert "warning: 9 rows were asked for, 3 are there" in short.stderr
    assert "all@1" in data("list").stdout.splitlines()[2]
    difference = data("diff", "duels@1", "duels@2").stdout
    assert "only in duels@1: 0\n" in difference and "only in duels@2: 1  (traces.jsonl:2)" in difference
    assert "in both, the same: 2" in difference and "have the same rows" in data("diff", "all@1", "all@1").stdout
    assert "needs a seed" in data("build", "x@1", "--from", "all@1", "--select", "random", code=2).stderr


def test_build_reads_the_hub_and_recipes(tmp_path: Path) -> None:
    hub = ("--hub", "openai/gsm8k", "--subset", "main", "--format", "gsm8k")
    assert "can make conversations and tasks: say which" in data("build", "gsm@1", *hub, code=2).stderr
    refused = data("build", "gsm@1", *hub, "--content", "tasks", code=2)
    assert "1 of 3 rows are malformed" in refused.stderr and "row 3: answer: has no number" in refused.stderr
    built = data("build", "gsm@1", *hub, "--content", "tasks", "--fault-share", "0.4")
    assert (
        "2 tasks rows, 1 malformed left out" in built.stdout
        and "warning: left out: openai/gsm8k main train row 3" in (built.stderr)
    )
    assert "give one of --recipe, --from and --hub" in data("build", "x@1", code=2).stderr
    assert "has tool_calls, agent," in data("build", "x@1", "--recipe", "smoke", "--dataset", "tool", code=2).stderr
    smoke = data("build", "smoke@1", "--recipe", "smoke", "--dataset", "tool_calls").stdout
    assert "conversations rows, digest" in smoke


def test_show_as_table_as_plot_and_as_json() -> None:
    data("add", "m@1", FIXTURES / "messages.jsonl", "--fault-share", "0.5")
    shown = data("show", "m@1").stdout
    for part in (
        "3 rows, digest",
        "1 left out",
        "tools by calls: set_light 1",
        "duplicates: 0",
        "of the characters are",
    ):
        assert part in shown
    assert shown.count("── messages.jsonl:") == 3 and "assistant commentary functions.set_light" in shown
    assert "█" in shown and "rows by characters" in shown
    found = json.loads(data("show", "m@1", "--json", "--examples", "2").stdout)
    assert len(found["examples"]) == 2 and found["lengths"]["unit"] == "characters"
    # What the assistant says and is trained on, of all that is said.
    trained = [
        "One call is enough.",
        "One moment.",
        '{"room":"hall","on":true}',
        "It is on.",
        "See you",
        "It is read too.",
    ]
    assert found["lengths"]["target_share"] == pytest.approx(sum(map(len, trained)) / found["lengths"]["total"])
    tokens = json.loads(data("show", "m@1", "--json", "--model", "shipped:tiny").stdout)["lengths"]
    assert tokens["unit"] == "tokens" and 0 < tokens["target_share"] < 1 and tokens["min"] > 20


def test_export_writes_a_file_once(tmp_path: Path) -> None:
    data("add", "sums@1", TRACES)
    lines = data("export", "sums@1", "--format", "trace").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in Path(TRACES).read_text().splitlines()]
    out = tmp_path / "out.jsonl"
    assert "4 records written" in data("export", "sums@1", "--format", "messages", "--output", out).stdout
    assert json.loads(out.read_text().splitlines()[0])["messages"][1] == {
        "role": "assistant",
        "thinking": "Seven eights.\n\n7 × 8 = 56",
        "content": "56",
    }
    assert "exists and is not overwritten" in data("export", "sums@1", "--output", out, code=2).stderr
    assert "they can as rows, messages" in data("export", "sums@1", "--format", "preference", code=2).stderr


def test_verify_finds_text_that_two_sets_share(tmp_path: Path) -> None:
    words = "a hen sat on the red roof of the barn and sang until the moon came up"
    for name, text in (
        ("train", f"Once {words}."),
        ("test", f"So {words.upper()}!"),
        ("other", "Nothing of the kind."),
    ):
        (tmp_path / f"{name}.txt").write_text(text + "\n")
        data("add", f"{name}@1", tmp_path / f"{name}.txt")
    shared = data("verify", "test@1", "--against", "train@1", code=2)
    assert "1 rows share 13 words in a row with train@1: test.txt:1" in shared.stdout
    data("verify", "other@1", "--against", "train@1")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    assert "there is no dataset 'x@1'" in data("show", "x@1", code=2).stderr
    assert "write NAME@VERSION" in data("add", "x", TRACES, code=2).stderr
    assert (
        "no row format 'glaiv' (did you mean glaive" in data("add", "x@1", TRACES, "--format", "glaiv", code=2).stderr
    )
    assert "say which with --format" in data("add", "x@1", FIXTURES / "sharegpt.jsonl", code=2).stderr
    assert "write it as COLUMN=VALUE" in data("add", "x@1", TRACES, "--filter", "meta", code=2).stderr
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    assert "no format fits the columns a;" in data("add", "x@1", tmp_path / "odd.jsonl", code=2).stderr
    assert "nowhere.jsonl: cannot be read" in data("add", "x@1", tmp_path / "nowhere.jsonl", code=2).stderr
