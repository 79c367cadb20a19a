"""Expected chips of the duel against playing every deal, and its traces."""

import random
from collections import Counter
from fractions import Fraction

import pytest

from posttrain.data.formats.rt_trace import FORMAT
from posttrain.worlds.duel import DECK, MOVES, Hand, chips, deal, expected_chips, optimal, result, trace, traces
from posttrain.worlds.registry import rows


def test_expected_chips_by_hand() -> None:
    # A nine with nothing open: 28 of 51 cards are lower, 3 tie, 20 are higher.
    nine = Hand((9, "h"), (), ante=1, call=3, top=5)
    assert expected_chips(nine) == [-1, Fraction(8 * 3, 51), Fraction(8 * 5, 51)]
    assert MOVES[optimal(nine)] == "raise"
    # A four: 8 lower, 3 tie, 40 higher. Calling loses 32/51 of 3 chips on average, folding 1.
    four = Hand((4, "h"), (), ante=1, call=3, top=5)
    assert expected_chips(four)[1] == Fraction(-32 * 3, 51) and MOVES[optimal(four)] == "fold"
    # With an ante of 2 the same four calls for 3.
    assert MOVES[optimal(Hand((4, "h"), (), ante=2, call=3, top=5))] == "call"


def test_open_cards_change_the_odds() -> None:
    eight = Hand((8, "c"), (), ante=1, call=2, top=3)
    assert expected_chips(eight)[2] == 0
    low_gone = Hand((8, "c"), ((2, "c"), (3, "c")), ante=1, call=2, top=3)
    assert expected_chips(low_gone)[2] == Fraction(-2 * 3, 49) and MOVES[optimal(low_gone)] == "call"


def test_expectation_is_the_mean_over_all_cards_of_the_opponent() -> None:
    rng = random.Random(0)
    for _ in range(50):
        hand, opponent = deal(rng, "train")
        assert opponent in hand.unseen and len(hand.unseen) == 51 - len(hand.seen)
        played = [chips(hand, card) for card in hand.unseen]
        assert expected_chips(hand) == [Fraction(sum(column), len(played)) for column in zip(*played, strict=True)]


def test_who_wins() -> None:
    hand = Hand((11, "s"), (), 1, 2, 3)
    assert [result(hand, card) for card in ((14, "c"), (11, "c"), (2, "c"))] == [-1, 0, 1]
    assert chips(hand, (14, "c")) == [-1, -2, -3] and chips(hand, (2, "c")) == [-1, 2, 3]


def test_every_move_is_best_somewhere_and_no_situation_is_in_both_splits() -> None:
    seen = {}
    for split in ("train", "heldout"):
        made = list(rows("duel", "tasks", split, 1500, 0))
        best = Counter(row["solution"][-1]["content"] for row in made)
        assert min(best.values()) > 100 and set(best) == {"[0]", "[1]", "[2]"}
        seen[split] = {row["prompt"]["messages"][0]["content"] for row in made}
    assert not seen["train"] & seen["heldout"]


def test_rules_of_thumb_play_by_the_card_alone() -> None:
    for row in rows("duel", "tasks", "train", 200, 0):
        card = int(row["prompt"]["messages"][0]["content"].split(".")[0].removeprefix("You have "))
        high = {"raise_or_fold": 2, "raise_or_call": 2}
        assert row["reference"]["rules"] == (high if card >= 9 else {"raise_or_fold": 0, "raise_or_call": 1})


def test_chips_of_the_deals_average_to_the_values() -> None:
    made = list(rows("duel", "tasks", "train", 4000, 1))
    for action in range(3):
        won = sum(row["reference"]["rewards"][action] for row in made) / len(made)
        expected = sum(row["reference"]["q_values"][action] for row in made) / len(made)
        # Chips spread by at most 9: the mean of 4000 deals is within four standard errors of 0.1.
        assert won == pytest.approx(expected, abs=0.4)


def test_traces_are_what_the_trace_store_takes() -> None:
    made = traces(60, seed=42)
    assert made[7] == trace(49)
    for one in made:
        assert [step["type"] for step in one["steps"]] == ["legal_moves", "observation", "unseen", "decision"]
        assert one["final_answer"] in MOVES and one["final_answer"] in one["steps"][3]["content"]
        assert one["meta"]["my_card"] != one["meta"]["opponent_card"]
        assert one["meta"]["opponent_card"] not in one["prompt"]
        assert FORMAT.makes["conversations"](one)["conversation"].messages[-1].content == one["final_answer"]
    assert len({one["final_answer"] for one in made}) == 3
    assert {one["meta"]["result"] for one in made} >= {"folded", "win", "loss"}


def test_a_trace_counts_the_unseen_cards_right() -> None:
    one = trace(3)
    numbers = [int(word) for word in one["steps"][2]["content"].split() if word.isdigit()]
    assert numbers[0] == sum(numbers[1:]) and numbers[0] in (49, 50, 51) and len(DECK) == 52
