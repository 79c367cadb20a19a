"""GRPO with filters, spare groups and a curriculum: killed and resumed, and with a server that samples."""

import json
from pathlib import Path

import pytest

from posttrain.run.folder import ASSETS
from posttrain.run.journal import read_lines
from tests.end_to_end.runs import KILLED, essence, posttrain, result
from tests.rollout.server import serve

RECIPE = str(Path(__file__).parent / "recipes" / "small_grpo.py")
# So few positions that slots are refilled while others are at work.
OPTIONS = ["--threads", "1", "--checkpoint-every-steps", "2", "--rollout-tokens", "1500"]


def run(runs: Path, *more: str, fault: str | None = None):
    return posttrain("run", RECIPE, "--runs-dir", str(runs), *OPTIONS, *more, fault=fault)


def episodes(runs: Path) -> list[dict]:
    return list(read_lines(runs / "small_grpo" / "phases" / "grpo" / "samples.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = tmp_path_factory.mktemp("undisturbed")
    done = run(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


def test_what_was_rolled_out_is_what_the_recipe_asks_for(undisturbed):
    rolled = episodes(undisturbed)
    assert [sum(one["step"] == step for one in rolled) for step in (1, 2, 3, 4)] == [16] * 4
    assert all(len(one["prompt_tokens"]) <= 84 for one in rolled if one["step"] == 1)
    assert any(len(one["prompt_tokens"]) > 84 for one in rolled if one["step"] > 1)
    for at in range(0, len(rolled), 4):
        seen = set()
        for one in rolled[at : at + 4]:
            again, tokens = tuple(one["tokens"]) in seen, sum(one["sampled"])
            seen.add(tuple(one["tokens"]))
            if one["reason"] in ("duplicate", "too short"):
                assert one["score"] is None and (again if one["reason"] == "duplicate" else tokens < 3)
            elif one["score"] is not None:
                assert not again and tokens >= 3
    counts = result(undisturbed, "grpo", "small_grpo")["counts"]
    assert counts["masked_duplicate"] == sum(one["reason"] == "duplicate" for one in rolled) > 0
    assert counts["masked_too_short"] == sum(one["reason"] == "too short" for one in rolled)
    assert counts["episodes"] == 64 and counts["ended_lost"] == 0
    metrics = list(read_lines(undisturbed / "small_grpo" / "phases" / "grpo" / "metrics.jsonl"))
    assert 0 < max(row["drift"] for row in metrics) < 1e-4


@pytest.mark.parametrize("fault", ["grpo.episodes_written#1", "grpo.episodes_written#3", "train.step#13"])
def test_killed_and_run_again_it_rolls_out_the_same_episodes(fault, undisturbed, tmp_path):
    assert run(tmp_path, fault=f"{fault}:kill").returncode == KILLED
    again = run(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert essence(tmp_path, "small_grpo") == essence(undisturbed, "small_grpo")


def test_a_server_samples_with_every_steps_adapter(undisturbed, tmp_path):
    lost = len(episodes(undisturbed)[0]["prompt_tokens"])
    with serve(ASSETS / "tiny_base", tmp_path) as server:
        server.refused_length = lost
        done = run(tmp_path, "--sampler-url", server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [name for name in server.models if "small_grpo" not in name] == ["base"] and server.loaded == 5
    rolled = episodes(tmp_path)
    missing = [one for one in rolled if one["ended"] == "lost"]
    assert missing and all(one["score"] is None and server.url in one["reason"] for one in missing)
    assert result(tmp_path, "grpo", "small_grpo")["counts"]["ended_lost"] == len(missing) < len(rolled)
    phase = tmp_path / "small_grpo" / "phases" / "grpo"
    assert max(row["drift"] for row in read_lines(phase / "metrics.jsonl")) < 1e-4
    assert not (phase / "sampler-adapter").exists()
    execution = json.loads((tmp_path / "small_grpo" / "run.json").read_text())["attempts"][0]["execution"]
    assert execution["sampler_url"] == server.url


def test_a_server_that_is_not_there_is_named_and_the_run_goes_on_without_it(undisturbed, tmp_path):
    url = "http://127.0.0.1:9"
    stopped = run(tmp_path, "--sampler-url", url)
    assert (
        stopped.returncode == 5 and f"sampler {url}/v1/models dropped the connection" in stopped.stdout + stopped.stderr
    )
    assert run(tmp_path).returncode == 0
    assert essence(tmp_path, "small_grpo") == essence(undisturbed, "small_grpo")
