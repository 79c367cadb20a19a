"""Episodes: turns of sampling and acting in a world, many at once. Evaluation is an episode at temperature 0."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import Renderer
from posttrain.errors import ChatFormatError
from posttrain.recipe.types import Sampling
from posttrain.rollout.sampler import Sampler
from posttrain.scoring.score import Score
from posttrain.worlds.registry import start

Ended = Literal["done", "format", "length", "turns"]


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
    """Play every task to its end, all together, one turn at a time."""
    environments = [start(task) for task in tasks]
    episodes = [
        Episode(task, renderer.prompt(with_shots(Conversation.model_validate(task["prompt"]), shots))) for task in tasks
    ]
    playing = list(range(len(tasks)))
    for turn in range(sampling.max_turns):
        prompts = [episodes[number].prompt + episodes[number].tokens for number in playing]
        samples = sampler.sample(prompts, [seeds[number] + turn for number in playing], sampling)
        still = []
        for number, sample in zip(playing, samples, strict=True):
            episode = episodes[number]
            episode.tokens += sample.tokens
            episode.sampled += [True] * len(sample.tokens)
            episode.logprobs += sample.logprobs
            if sample.ended == "length":
                episode.ended = "length"
                continue
            try:
                replies = environments[number].respond(renderer.parse(sample.tokens))
            except ChatFormatError:
                episode.ended = "format"
                continue
            if not replies:
                episode.ended = "done"
                continue
            if turn + 1 < sampling.max_turns:
                seen = renderer.continuation(replies)
                episode.tokens += seen
                episode.sampled += [False] * len(seen)
                episode.logprobs += [0.0] * len(seen)
            still.append(number)
        advance(len(playing) - len(still))
        playing = still
        if not playing:
            break
    advance(len(playing))
    for episode, environment in zip(episodes, environments, strict=True):
        episode.score = environment.score()
    return episodes


def trimmed(episode: Episode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, sampled mask and log-probabilities up to the last sampled token."""
    last = max((place for place, chosen in enumerate(episode.sampled) if chosen), default=-1) + 1
    return (
        np.array(episode.tokens[:last], np.int64),
        np.array(episode.sampled[:last], bool),
        np.array(episode.logprobs[:last], np.float32),
    )
