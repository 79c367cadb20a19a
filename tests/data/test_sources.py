"""Sources are read a record at a time, selected exactly, and name whatever is wrong with them."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import hub as hub_module
from posttrain.data.filters import passes
from posttrain.data.records import records
from posttrain.data.rows import Fault
from posttrain.data.sources import content_digest, label, local_files, read_source, repeat, weight
from posttrain.errors import DataError
from posttrain.recipe.types import Differs, OneOf, Selection, TextLength, WorldSource
from tests.data.sources import HUB, file, hub, read

LONG = TextLength(kind="text_length", column="answer", at_least=100, at_most=None)
EDITED = Differs(kind="differs", first="old_contents", second="new_contents", at_most=8000)


def take(max_samples: int | None, seed: int | None = None) -> Selection:
    return Selection(max_samples=max_samples, seed=seed, repeat=1, weight=None)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(HUB))


def texts(tmp_path: Path, count: int = 100, bad: tuple[int, ...] = ()) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = ["nonsense" if n in bad else json.dumps({"text": f"text {n}", "n": n}) for n in range(1, count + 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------- files


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("text,n\n" + "".join(f'"{row["text"]}",{row["n"]}\n' for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(row["text"] + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    wanted = [{"text": f"über {n}, ja", "n": n} for n in range(600)]
    path = write(tmp_path / f"rows{suffix}", wanted)
    rows, faults = read(file(path, "text"), "text")
    assert [row.text for row in rows] == [row["text"] for row in wanted] and not faults
    assert rows[599].id == f"rows{suffix}:600"


def test_files_of_a_pattern_are_read_in_order_as_one(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}", "n": n} for n in range(2)])
    source = file(tmp_path / "*.jsonl", "text")
    placed = list(read_source(source, "text"))
    assert [row.text for _, row in placed] == ["a 0", "a 1", "b 0", "b 1", "c 0", "c 1"]
    assert [place for place, _ in placed][2] == f"{tmp_path / 'b.jsonl'} row 1"
    assert [row.id for _, row in placed] == [f"*.jsonl:{n}" for n in range(1, 7)]
    assert [path.name for path in local_files(source)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    with pytest.raises(DataError, match=r"nothing-\*\.jsonl: no file matches it"):
        list(read_source(file(tmp_path / "nothing-*.jsonl", "text"), "text"))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"text,n\na,1\nb\n", Fault("n", "is missing: the row has fewer fields than the header")),
        (b"text,n\na,1\nb,2,3,4\n", Fault("row", "has 2 more fields than the header")),
        (b"text,n\na,1\nb\xff,2\n", Fault("text", "not UTF-8")),
        (b'text,n\na,1\n"b"x,2\n', Fault("row", "not CSV: ',' expected after '\"'")),
    ],
)
def test_a_faulty_line_of_a_csv_is_named(tmp_path: Path, data: bytes, fault: Fault) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(data)
    placed = list(read_source(file(path, "text"), "text"))
    assert placed[1] == (f"{path} row 2", fault) and len(placed) == 2


def test_a_csv_may_begin_with_a_byte_order_mark_and_hold_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\r\n"two\nlines",1\r\nx,2\r\n')
    assert [record["text"] for record in records(path) if isinstance(record, dict)] == ["two\nlines", "x"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rows.json", r"files \.json cannot be read.*did you mean \.jsonl"),
        ("rows", "files without a suffix cannot be read"),
        ("rows.parquet", "no Parquet"),
        ("rows.csv", "there is no row in it"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_text("text\n" if name.endswith("csv") else "x")
    with pytest.raises(DataError, match=reason):
        list(records(tmp_path / name))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_stays_flat_as_rows_grow_tenfold(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for number, count in enumerate((1_000, 10_000)):
        path = write(tmp_path / f"{number}{suffix}", [{"text": f"{n} " * 50, "n": n} for n in range(count)])
        list(read_source(file(path, "text", selection=take(5)), "text"))  # imports are no part of it
        tracemalloc.start()
        assert sum(1 for _ in read_source(file(path, "text"), "text")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 10,000 rows are 2.4 million characters.
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 1_000_000


# ---------------------------------------------------------------- filters and selection


@pytest.mark.parametrize(
    ("one", "record", "kept"),
    [
        (OneOf(kind="one_of", column="meta.game", values=("duel",)), {"meta": {"game": "duel"}}, True),
        (OneOf(kind="one_of", column="meta.game", values=("duel",)), {"meta": {"game": "sums"}}, False),
        (OneOf(kind="one_of", column="meta.game", values=("duel",)), {"meta": None}, False),
        (OneOf(kind="one_of", column="n", values=(1,)), {"n": 1}, True),
        (OneOf(kind="one_of", column="n", values=(1,)), {"n": True}, False),
        (OneOf(kind="one_of", column="n", values=(1,)), {"n": "1"}, False),
        (LONG, {"answer": "a" * 100}, True),
        (LONG, {"answer": "a" * 99}, False),
        (LONG, {"answer": None}, False),
        (TextLength(kind="text_length", column="a", at_least=0, at_most=2), {"a": "abc"}, False),
        (TextLength(kind="text_length", column="a", at_least=0, at_most=0), {"a": "abc"}, False),
        (EDITED, {"old_contents": "a", "new_contents": "a"}, False),
        (EDITED, {"old_contents": "a", "new_contents": "b" * 8001}, True),
        (EDITED, {"old_contents": "a", "new_contents": "b" * 8002}, False),
    ],
)
def test_filters(one: Any, record: dict[str, Any], kept: bool) -> None:
    assert passes(record, (one,)) is kept


def test_what_is_filtered_is_counted(mirror: None) -> None:
    counts: Counter[str] = Counter()
    source = hub("bigcode/commitpackft", "commitpackft", files="data/python/data.jsonl", filters=(EDITED,))
    placed = list(read_source(source, "conversations", counts))
    assert [row.id[-2:] for _, row in placed if not isinstance(row, Fault)] == [":1", ":4"] and counts == {
        "filtered": 2
    }


def test_the_first_rows_are_counted_without_faults(tmp_path: Path) -> None:
    path = texts(tmp_path, bad=(2, 4))
    rows, faults = read(file(path, "text", selection=take(4)), "text")
    assert [row.text for row in rows] == ["text 1", "text 3", "text 5", "text 6"] and len(faults) == 2


def test_a_random_selection_is_exact_seeded_and_in_order(tmp_path: Path) -> None:
    path = texts(tmp_path, bad=(7, 50))
    odd = OneOf(kind="one_of", column="n", values=tuple(range(1, 101, 2)))

    def drawn(seed: int) -> list[int]:
        rows, faults = read(file(path, "text", selection=take(20, seed), filters=(odd,)), "text")
        assert len(faults) == 2
        return [int(row.text.removeprefix("text ")) for row in rows]

    assert drawn(1) == drawn(1) == sorted(drawn(1)) and drawn(1) != drawn(2)
    assert len(drawn(1)) == 20 and all(number % 2 and number != 7 for number in drawn(1))
    # Every good row is drawn by some seed, and more than there are gives all.
    assert {number for seed in range(40) for number in drawn(seed)} == set(range(1, 101, 2)) - {7}
    assert len(read(file(path, "text", selection=take(1000, 3)), "text")[0]) == 98


def test_a_source_says_its_effort_weight_and_repeat(mirror: None) -> None:
    chosen = Selection(max_samples=None, seed=None, repeat=3, weight=0.25)
    source = hub("Anthropic/hh-rlhf", "hh_rlhf", selection=chosen, reasoning_effort="medium")
    assert (weight(source), repeat(source)) == (0.25, 3)
    assert read(source, "pairs")[0][0].prompt.reasoning_effort == "medium"
    world = WorldSource(kind="world", world="identity", split="train", count=2, seed=0)
    assert (weight(world), repeat(world)) == (None, 1)


# ---------------------------------------------------------------- the hub


def test_subset_and_split_are_those_of_the_card(mirror: None) -> None:
    test_rows, _ = read(hub("openai/gsm8k", "gsm8k", "main", "test"), "tasks")
    assert [row.id for row in test_rows] == ["openai/gsm8k/main:test:1"] and test_rows[0].reference["answer"] == 2.0
    for wrong in (hub("openai/gsm8k", "gsm8k", "mian"), hub("openai/gsm8k", "gsm8k", "main", "dev")):
        with pytest.raises(DataError, match=r"openai/gsm8k: .*(mian|dev)"):
            list(read_source(wrong, "tasks"))


GATED = "Dataset 'Salesforce/xlam-function-calling-60k' is a gated dataset on the Hub. You must be authenticated."


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)


def test_a_gated_set_says_how_to_get_access_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    refuse(monkeypatch, DatasetNotFoundError(GATED))
    with pytest.raises(DataError) as caught:
        list(read_source(hub("Salesforce/xlam-function-calling-60k", "xlam"), "conversations"))
    for part in (
        "gated",
        "https://huggingface.co/datasets/Salesforce/xlam-function-calling-60k",
        "HF_TOKEN",
        "optional",
    ):
        assert part in str(caught.value)


def test_an_optional_set_that_is_gated_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets.exceptions import DatasetNotFoundError

    refuse(monkeypatch, DatasetNotFoundError(GATED))
    counts: Counter[str] = Counter()
    source = hub("Salesforce/xlam-function-calling-60k", "xlam", optional=True)
    assert list(read_source(source, "conversations", counts)) == [] and counts == {"unavailable": 1}
    assert capsys.readouterr().err.startswith("warning: Salesforce/xlam-function-calling-60k: ")


def test_a_set_out_of_reach_names_the_network_and_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTTRAIN_HUB_DIR", raising=False)
    # Tests run offline: this is what the library itself says then.
    with pytest.raises(DataError, match=r"check the name and the network, or put a copy at \$POSTTRAIN_HUB_DIR/openai"):
        list(read_source(hub("openai/gsm8k", "gsm8k", "main", selection=take(1)), "tasks"))


def test_what_decides_the_rows_is_in_the_digest_and_where_they_lie_is_not(tmp_path: Path, mirror: None) -> None:
    one, other = texts(tmp_path), tmp_path / "elsewhere"
    other.mkdir()
    copy = other / "rows.jsonl"
    copy.write_bytes(one.read_bytes())
    assert content_digest(file(one, "text")) == content_digest(file(copy, "text"))
    assert label(file(one, "text")) == label(file(copy, "text")) == "rows.jsonl"
    copy.write_text("other\n")
    assert content_digest(file(one, "text")) != content_digest(file(copy, "text"))
    assert content_digest(hub("openai/gsm8k", "gsm8k", "main")) is not None
    assert hub_module.mirrored(hub("no/such", "gsm8k")) is None


NO_TORCH = """
import sys
from posttrain.cli.main import main
from posttrain.data.sources import read_source
from posttrain.recipes._sft_rl_data import sft_rl_data
for dataset in sft_rl_data(True, 512, 0):
    for source in dataset.sources:
        assert sum(1 for _ in read_source(source, dataset.content)) > 0
assert "datasets" in sys.modules
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_reading_the_hub_imports_no_torch(mirror: None) -> None:
    subprocess.run([sys.executable, "-c", NO_TORCH], check=True)
