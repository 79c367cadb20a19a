"""High-card duel: one hidden card each, and how much to play for. The higher card wins, aces are high, equal cards tie.

The opponent's card is any unseen one with equal probability, so every action's expected chips are an exact fraction.
"""

import random
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from posttrain.chat.conversation import Conversation, Message, reasoned
from posttrain.worlds.decisions import decision_task, open_choice
from posttrain.worlds.names import Split

RANKS = tuple(range(2, 15))
SUITS = "cdhs"
DECK = tuple((rank, suit) for rank in RANKS for suit in SUITS)
MOVES = ("fold", "call", "raise")
TRACE_VERSION = "1.0"
Card = tuple[int, str]


@dataclass(frozen=True)
class Hand:
    """What a player knows. Chips: `ante` is lost by folding, `call` and `top` are what calling and raising play for."""

    card: Card
    seen: tuple[Card, ...]
    """Cards that lie open; the opponent's is none of them."""
    ante: int
    call: int
    top: int

    @property
    def unseen(self) -> tuple[Card, ...]:
        return tuple(card for card in DECK if card != self.card and card not in self.seen)

    @property
    def split(self) -> Split:
        """One situation in eight is held out; suits decide nothing and make no other situation."""
        key = (self.card[0], sorted(rank for rank, _ in self.seen), self.ante, self.call, self.top)
        return "heldout" if zlib.crc32(repr(key).encode()) % 8 == 0 else "train"


def deal(rng: random.Random, split: Split) -> tuple[Hand, Card]:
    """A hand of the split and the opponent's card."""
    while True:
        card, opponent, *seen = rng.sample(DECK, 2 + rng.randint(0, 2))
        ante = rng.randint(1, 3)
        call = ante + rng.randint(1, 3)
        hand = Hand(card, tuple(seen), ante, call, call + rng.randint(1, 3))
        if hand.split == split:
            return hand, opponent


def result(hand: Hand, opponent: Card) -> int:
    """1 won, 0 tied, -1 lost."""
    return (hand.card[0] > opponent[0]) - (hand.card[0] < opponent[0])


def chips(hand: Hand, opponent: Card) -> list[int]:
    """What each move brings against this card."""
    won = result(hand, opponent)
    return [-hand.ante, won * hand.call, won * hand.top]


def expected_chips(hand: Hand) -> list[Fraction]:
    """What each move brings on average over the opponent's card."""
    edge = Fraction(sum(result(hand, card) for card in hand.unseen), len(hand.unseen))
    return [Fraction(-hand.ante), edge * hand.call, edge * hand.top]


def optimal(hand: Hand) -> int:
    """The most cautious of the best moves."""
    values = expected_chips(hand)
    return values.index(max(values))


def raise_or_fold(hand: Hand) -> int:
    """By the card alone: the middle rank is 8."""
    return 2 if hand.card[0] > 8 else 0


def raise_or_call(hand: Hand) -> int:
    return 2 if hand.card[0] > 8 else 1


RULES = {"raise_or_fold": raise_or_fold, "raise_or_call": raise_or_call}
"""Rules of thumb to compare with."""


# ---------------------------------------------------------------- tasks


def _asked(hand: Hand) -> str:
    seen = f"Not in play: {' '.join(str(rank) for rank, _ in hand.seen)}.\n" if hand.seen else ""
    moves = f"[0] cancel, pay {hand.ante}\n[1] call for {hand.call}\n[2] open for {hand.top}"
    return f"You have {hand.card[0]}.\n{seen}{moves}"


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    """One decision. Rewards are the chips of this deal, Q-values their expectation."""
    hand, opponent = deal(rng, split)
    reference = {
        "q_values": [float(value) for value in expected_chips(hand)],
        "rewards": [float(value) for value in chips(hand, opponent)],
        "rules": {name: rule(hand) for name, rule in RULES.items()},
    }
    prompt = Conversation(messages=(Message(role="user", content=_asked(hand)),))
    return decision_task(prompt, reference)


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    return open_choice(rng, task(rng, split))


# ---------------------------------------------------------------- traces


def _shown(card: Card) -> str:
    return {11: "J", 12: "Q", 13: "K", 14: "A"}.get(card[0], str(card[0])) + card[1]


def trace(seed: int) -> dict[str, Any]:
    """A duel played by the optimal move, in the shape of the RT system's traces (`data/formats/rt_trace.py`)."""
    found = played(*deal(random.Random(f"duel/trace/{seed}"), "train"))
    return {**found, "meta": {**found["meta"], "seed": seed}}


def played(hand: Hand, opponent: Card) -> dict[str, Any]:
    """The trace of one deal."""
    move, values = optimal(hand), expected_chips(hand)
    moves = [f"fold (lose {hand.ante})", f"call (play for {hand.call})", f"raise (play for {hand.top})"]
    seen = " ".join(map(_shown, hand.seen)) or "nothing"
    wins, ties, losses = (sum(result(hand, card) == won for card in hand.unseen) for won in (1, 0, -1))
    on_average = ", ".join(f"{name} {float(value):+.2f}" for name, value in zip(MOVES, values, strict=True))
    steps = {
        "legal_moves": ", ".join(moves),
        "observation": f"My card is {_shown(hand.card)}. Open on the table: {seen}.",
        "unseen": f"Of {len(hand.unseen)} unseen cards {wins} lose to mine, {ties} tie and {losses} beat it.",
        "decision": f"On average {on_average} chips. I {MOVES[move]}.",
    }
    return {
        "trace_version": TRACE_VERSION,
        "prompt": f"High-card duel. You hold {_shown(hand.card)}; {seen} lies open. Moves: {', '.join(moves)}.",
        "final_answer": MOVES[move],
        "steps": [{"i": i, "type": kind, "content": content} for i, (kind, content) in enumerate(steps.items(), 1)],
        "meta": {
            "source": "ungar",
            "game": "high_card_duel",
            "my_card": _shown(hand.card),
            "opponent_card": _shown(opponent),
            "result": "folded" if move == 0 else {1: "win", 0: "tie", -1: "loss"}[result(hand, opponent)],
            "chips": chips(hand, opponent)[move],
        },
    }


def reveal_trace(seed: int) -> dict[str, Any]:
    """The same without a choice, as the RT system has it: both reveal, so there is nothing to learn but the form."""
    card, opponent = random.Random(f"duel/reveal/{seed}").sample(DECK, 2)
    won = (card[0] > opponent[0]) - (card[0] < opponent[0])
    steps = {
        "legal_moves": "reveal",
        "observation": f"My card is {_shown(card)}.",
        "unseen": f"{len(DECK) - 1} cards are unseen, my opponent's among them.",
        "decision": "I reveal.",
    }
    return {
        "trace_version": TRACE_VERSION,
        "prompt": "High-card duel. You hold one hidden card, as your opponent does. Moves: reveal.",
        "final_answer": "reveal",
        "steps": [{"i": i, "type": kind, "content": content} for i, (kind, content) in enumerate(steps.items(), 1)],
        "meta": {
            "source": "ungar",
            "game": "high_card_duel",
            "my_card": _shown(card),
            "opponent_card": _shown(opponent),
            "result": {1: "win", 0: "tie", -1: "loss"}[won],
            "seed": seed,
        },
    }


TRACES = {"decision": trace, "reveal": reveal_trace}
"""By variant."""


def traces(count: int, seed: int, variant: str = "decision") -> list[dict[str, Any]]:
    """Trace number n has the seed `seed` + n."""
    return [TRACES[variant](seed + number) for number in range(count)]


def trace_conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    """A trace as it is learned from."""
    found = played(*deal(rng, split))
    steps = [step["content"] for step in found["steps"]]
    return {"conversation": reasoned(found["prompt"], steps, found["final_answer"]).model_dump()}


def trace_task(rng: random.Random, split: Split) -> dict[str, Any]:
    """What a trace asks; right is the move it ends in."""
    found = played(*deal(rng, split))
    asked, *answer = reasoned(found["prompt"], [], found["final_answer"]).messages
    return {
        "world": "answers",
        "prompt": Conversation(messages=(asked,)).model_dump(),
        "reference": {"kind": "exact", "answer": found["final_answer"]},
        "solution": [message.model_dump() for message in answer],
    }
