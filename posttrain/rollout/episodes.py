"""Episodes: turns of sampling and acting in a world, many at once. Evaluation is an episode at temperature 0."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import Renderer
from posttrain.errors import ChatFormatError
from posttrain.recipe.types import Sampling
from posttrain.rollout.sampler import Sampled, Sampler
from posttrain.scoring.score import Score
from posttrain.worlds.environment import Environment
from posttrain.worlds.registry import start

Ended = Literal["done", "format", "length", "turns", "lost"]
"""`lost`: the sampler gave up on it."""


SCORERS = 2
"""Episodes that are scored at once; as many as there are workers for commands."""


@dataclass
class Episode:
    """One rollout. `tokens` follow the prompt; `sampled` marks those the model chose, `logprobs` is 0 elsewhere."""

    task: dict[str, Any]
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Ended = "turns"
    score: Score | None = None


def seed_of(*parts: int | str) -> int:
    """A 64-bit seed from any names and numbers, such as (recipe seed, phase, step, group, member)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def with_shots(prompt: Conversation, shots: Sequence[dict[str, Any]]) -> Conversation:
    """The task's conversation with solved tasks in front of it, their tools offered as well (few-shot)."""
    messages: list[Message] = []
    tools = {tool.name: tool for tool in prompt.tools}
    for shot in shots:
        solved = Conversation.model_validate(shot["prompt"])
        tools |= {tool.name: tool for tool in solved.tools}
        messages += [*solved.messages, *(Message.model_validate(message) for message in shot["solution"])]
    return prompt.model_copy(update={"messages": (*messages, *prompt.messages), "tools": tuple(tools.values())})


def run_episodes(
    sampler: Sampler,
    renderer: Renderer,
    tasks: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    sampling: Sampling,
    shots: Sequence[dict[str, Any]] = (),
    advance: Callable[[int], None] = lambda finished: None,
) -> list[Episode]:
    """Play every task to its end; an episode goes on as soon as its world has answered.

    What is over is scored while others are sampled: programs run in processes of their own.
    """
    environments = [start(task) for task in tasks]
    shown = [with_shots(Conversation.model_validate(task["prompt"]), shots) for task in tasks]
    episodes = [Episode(task, renderer.prompt(conversation)) for task, conversation in zip(tasks, shown, strict=True)]
    turns = [0] * len(tasks)

    def reply(number: int, sampled: Sampled) -> list[int] | None:
        turns[number] += 1
        last = turns[number] == sampling.max_turns
        more = take_turn(episodes[number], environments[number], renderer, sampled, last)
        if more is None:
            if episodes[number].score is None:
                scores[number] = scorers.submit(environments[number].score)
            advance(1)
        return more

    scores: dict[int, Future[Score]] = {}
    scorers = ThreadPoolExecutor(SCORERS, thread_name_prefix="scorer")
    try:
        sampler.play([episode.prompt for episode in episodes], seeds, sampling, reply)
        for number, score in sorted(scores.items()):
            episodes[number].score = score.result()
    finally:
        scorers.shutdown(cancel_futures=True)
    return episodes


def take_turn(
    episode: Episode, environment: Environment, renderer: Renderer, sampled: Sampled, last: bool
) -> list[int] | None:
    """Add a turn to its episode and act on it; returns the tokens of the world's answer, None when it is over."""
    episode.tokens += sampled.tokens
    episode.sampled += [True] * len(sampled.tokens)
    episode.logprobs += sampled.logprobs
    if sampled.ended == "lost":
        episode.ended, episode.score = "lost", Score(None, reason=sampled.reason)
        return None
    if sampled.ended == "length":
        episode.ended = "length"
        return None
    try:
        replies = environment.respond(renderer.parse(sampled.tokens))
    except ChatFormatError:
        episode.ended = "format"
        return None
    if not replies:
        episode.ended = "done"
    if not replies or last:
        return None
    seen = renderer.continuation(replies)
    episode.tokens += seen
    episode.sampled += [False] * len(seen)
    episode.logprobs += [0.0] * len(seen)
    return seen


def trimmed(episode: Episode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, sampled mask and log-probabilities up to the last sampled token."""
    last = max((place for place, chosen in enumerate(episode.sampled) if chosen), default=-1) + 1
    return (
        np.array(episode.tokens[:last], np.int64),
        np.array(episode.sampled[:last], bool),
        np.array(episode.logprobs[:last], np.float32),
    )
