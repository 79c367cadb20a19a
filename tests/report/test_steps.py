"""Long files read on: the same as reading them whole, whatever is torn, repeated or replaced."""

import json

import numpy as np

from posttrain.report.read import read_run
from posttrain.report.steps import StepColumns
from tests.report.runs import FakeRun, phase


def made(tmp_path):
    return FakeRun(tmp_path / "run", [phase("sft", "sft", model="base", dataset="d")])


def test_columns_equal_what_the_report_reads(tmp_path):
    fake = made(tmp_path)
    path = fake.run.phase("sft").metrics
    fake.steps("sft", [{"step": step, "loss": 1 / step} for step in range(1, 51)], torn='{"step": 51, "lo')
    columns = StepColumns(path)
    while columns.read_on(200):
        pass
    assert len(columns) == 50 and not columns.at_end
    fake.append(path, [], torn='ss": 0.5}\nnonsense\n')
    # Run again from step 40 after a kill; a number may be missing, and another begin late.
    fake.steps("sft", [{"step": step, "loss": None if step == 45 else 2.0, "reward": step} for step in range(40, 61)])
    while columns.read_on(200):
        pass
    assert columns.at_end
    (record,) = read_run(fake.run).phases
    for metric in ("loss", "reward"):
        wanted = [(row["step"], row[metric]) for row in record.metrics if row.get(metric) is not None]
        assert columns.points(metric).tolist() == [list(pair) for pair in wanted]
    assert columns.last(2) == ({"step": 59, "loss": 2.0, "reward": 59.0}, {"step": 60, "loss": 2.0, "reward": 60.0})
    assert columns.points("absent").shape == (0, 2)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    fake = made(tmp_path)
    path = fake.run.phase("sft").metrics
    fake.steps("sft", [{"step": step, "loss": 1.0} for step in range(1, 4)])
    columns = StepColumns(path)
    columns.read_on()
    path.unlink()
    assert columns.read_on() and len(columns) == 0
    fake.steps("sft", [{"step": 1, "loss": 7.0}])
    columns.read_on()
    assert np.array_equal(columns.points("loss"), [[1, 7]])
    other = path.with_name("other")
    other.write_text(json.dumps({"step": 9, "loss": 3.0}) + "\n" + json.dumps({"step": 10, "loss": 3.0}) + "\n")
    other.rename(path)
    columns.read_on()
    assert columns.points("loss").tolist() == [[9, 3], [10, 3]]
