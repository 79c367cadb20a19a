"""One line for several samples of a task: the majority's score, and what all of them say."""

import pytest

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.phases.evaluate import as_voted_answer, counts, means
from posttrain.recipe.types import Vote
from posttrain.recipes.quickstart import CHAT
from posttrain.rollout.episodes import Episode
from posttrain.run.folder import ASSETS
from posttrain.scoring.decisions import score_decision

TABLE = {"q_values": [1.0, 3.0], "rewards": [0.2, 0.8]}
VOTE = Vote(samples=5, counts="majority", pass_mark=0.5, pass_at=(1, 2))
TOKENIZER = Tokenizer.load(ASSETS / "tiny_base")
RENDER = renderer(CHAT, TOKENIZER)


def said(text: str) -> Episode:
    episode = Episode(
        {"id": "one", "prompt": {"metadata": {"category": "odd"}}}, TOKENIZER.encode("store 3"), TOKENIZER.encode(text)
    )
    episode.score = score_decision(TABLE, text)
    return episode


def test_the_majority_is_scored_and_all_samples_are_told() -> None:
    texts = ["[0]", "none", "so [1]", "[1]", "[7]"]
    line = as_voted_answer([said(text) for text in texts], VOTE, "heldout", RENDER)
    assert (line["id"], line["dataset"], line["completion"], line["reason"]) == ("one", "heldout", "so [1]", None)
    assert line["score"] == 0.8
    # Two of five pass, and of the ten pairs three have none that does; scores are 0.2, 0.8 and 0.8.
    expected = {"reward": 0.8, "optimal": 1.0, "q_value": 3.0, "regret": 0.0, "mean": 0.6, "agreement": 0.4}
    assert line["parts"] == pytest.approx({**expected, "pass@1": 0.4, "pass@2": 0.7})
    assert [sample["answer"] for sample in line["samples"]] == ["0", None, "1", "1", None]
    assert counts([line]) == {"heldout.asked": 1, "heldout.unscorable_samples": 2}
    assert means([line])["heldout.optimal"] == 1.0


def test_without_any_answer_a_task_is_unscorable_and_in_no_mean() -> None:
    line = as_voted_answer([said("none") for _ in range(5)], VOTE, "heldout", RENDER)
    assert line["score"] is None and "none of 5 samples" in line["reason"]
    assert line["parts"] == {"pass@1": 0.0, "pass@2": 0.0}
    assert counts([line]) == {"heldout.asked": 1, "heldout.unscorable": 1, "heldout.unscorable_samples": 5}
    assert means([line]) == {}


def test_the_mean_of_several_samples_and_the_chance_that_one_of_k_passes() -> None:
    vote = VOTE.model_copy(update={"counts": "mean"})
    line = as_voted_answer([said(text) for text in ["[0]", "none", "[1]", "[1]", "[7]"]], vote, "heldout", RENDER)
    assert line["score"] == pytest.approx(0.6) and line["category"] == "odd"
    expected = {"reward": 0.6, "optimal": 2 / 3, "q_value": 7 / 3, "regret": 2 / 3}
    assert line["parts"] == pytest.approx({**expected, "pass@1": 0.4, "pass@2": 0.7})
