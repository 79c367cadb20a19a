"""`posttrain run smoke` killed at named points and at random times ends with the bits of an undisturbed run."""

import random

import pytest

from tests.end_to_end.runs import KILLED, essence, smoke, smoke_killed_after

POINTS = [
    "prepare.dataset_written#2",
    "prepare.before_commit#4",
    "evaluate.dataset_done#2",
    "train.step#1",
    "train.step#4",
    "checkpoint.file_written",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "train.before_final",
    "train.after_final",
    "merge.shard_written",
    "merge.before_commit",
    "train.step#7",
    "train.step#10",
    "grpo.episodes_written#2",
    "train.step#14",
    "export.adapter_written",
    "export.hf_written",
    "export.gguf_written",
    "phase.before_result#4",
    "phase.after_result#4",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = tmp_path_factory.mktemp("undisturbed")
    done = smoke(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return essence(runs)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_and_run_again_gives_the_same_bits(point, undisturbed, tmp_path):
    assert smoke(tmp_path, fault=f"{point}:kill").returncode == KILLED
    again = smoke(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert essence(tmp_path) == undisturbed


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_time_and_run_again_gives_the_same_bits(seed, undisturbed, tmp_path):
    killed = smoke_killed_after(tmp_path, random.Random(seed).uniform(1, 20))
    assert killed in (KILLED, 0)
    again = smoke(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert essence(tmp_path) == undisturbed
