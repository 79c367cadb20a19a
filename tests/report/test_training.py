"""The early warning and the cost line, from steps written by hand."""

import pytest

from posttrain.report import curves
from posttrain.report.document import document
from posttrain.report.page import page
from posttrain.report.read import read_run
from posttrain.report.text import markdown
from posttrain.report.training import cost, overfitting
from tests.report.runs import FakeRun, phase


def made(tmp_path, training, held_out, **fields):
    """A run whose one phase looks at its held-out loss after every second step."""
    run = FakeRun(tmp_path / "run", [phase("sft", "sft", model="base", dataset="d")])
    rows = [{"step": step, "loss": loss, **fields} for step, loss in enumerate(training, start=1)]
    for row, loss in zip(rows[1::2], held_out, strict=True):
        row["held_out_loss"] = loss
    run.steps("sft", rows)
    return read_run(run.run)


FALLING = [4.0, 3.0, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7]


def test_a_rise_while_the_training_loss_falls_is_told_with_its_numbers(tmp_path):
    run = made(tmp_path, FALLING, [3.1, 2.5, 2.6, 2.9])
    found = overfitting(run.phases[0])
    assert found is not None and found.step == 8
    assert "rose from 2.5 (step 4) to 2.9 (step 8)" in found.what and "fell from 1.75 to 0.75" in found.what
    content = document(run)
    assert [(one.time, one.phase) for one in content.incidents] == [("step 8", "sft")]
    assert page(content).count("early warning") == 2 and "early warning" in markdown(content)


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        (FALLING, [3.1, 2.5, 2.4, 2.3]),  # falls
        (FALLING, [3.1, 2.8, 2.5, 2.9]),  # one look alone
        (FALLING, [3.1, 2.5, 2.51, 2.52]),  # less than a hundredth
        ([4.0, 3.0, 2.0, 1.5, 2.6, 2.9, 2.8, 2.7], [3.1, 2.5, 2.6, 2.9]),  # both rise: no learning by heart
        (FALLING[:2], [3.1]),
        ([], []),
    ],
)
def test_nothing_else_is_a_warning(tmp_path, training, held_out):
    assert overfitting(made(tmp_path, training, held_out).phases[0]) is None


def test_held_out_data_is_used_by_the_phase_but_nothing_is_made_from_it(tmp_path):
    data = [{"name": name, "content": "text", "sources": [], "max_tokens": 8} for name in ("d", "held")]
    spec = phase("sft", "sft", model="base", dataset="d", held_out={"dataset": "held", "every_steps": 2})
    run = FakeRun(tmp_path / "run", [phase("prepare", "data", datasets=data), spec])
    run.complete("sft")
    content = document(read_run(run.run))
    assert {dataset.name: dataset.used_by for dataset in content.datasets} == {"d": ("sft",), "held": ("sft",)}
    assert [name for name, _ in content.lineage.children[0].data] == ["d"]


def test_held_out_values_are_rings_in_the_panel_of_their_namesake(tmp_path):
    (panel,) = curves.phase_curves(made(tmp_path, [4.0, 2.0, 1.0, 1.0], [3.0, 5.0]).phases[0])
    assert panel.svg.count('class="held"') == 3 and "rings: held-out data" in panel.caption
    # The highest value is a held-out one: it stands at the top, the lowest at the bottom.
    assert f'cy="{curves.TOP:.1f}" r="3"' in panel.svg


def test_the_cost_is_said_in_words(tmp_path):
    fields = {"tokens": 300, "seconds": 0.2, "peak_flops_share": 0.25, "peak_memory_bytes": 1_200_000_000}
    run = made(tmp_path, [1.0, 0.9], [1.0], **fields)
    assert cost(run.phases[0]) == "1,500 tokens/s, 25.0 % of peak FLOP/s, 1.2 GB of memory at most"
    unknown = made(tmp_path / "other", [1.0, 0.9], [1.0], **fields | {"peak_flops_share": None})
    assert cost(unknown.phases[0]) == "1,500 tokens/s, 1.2 GB of memory at most"
    assert cost(made(tmp_path / "old", [1.0, 0.9], [1.0]).phases[0]) == ""
