"""Episodes that are over are scored while others are still sampled, and get the scores that they get alone."""

import threading
from itertools import groupby

import pytest

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.recipe.types import Sampling
from posttrain.recipes.quickstart import CHAT
from posttrain.rollout import episodes as module
from posttrain.rollout.episodes import run_episodes
from posttrain.rollout.sampler import Sampled, Sampler
from posttrain.run.folder import ASSETS
from posttrain.scoring.score import Score
from posttrain.worlds.registry import rows, start

RENDER = renderer(CHAT, Tokenizer.load(ASSETS / "tiny_base"))
SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=99, max_turns=8)
TASKS = list(rows("repair", "tasks", "heldout", 24, 4))


def turns(task, solution):
    """What a model writes that acts on this task as `solution` says."""
    prompt = Conversation.model_validate(task["prompt"])
    said = tuple(Message.model_validate(message) for message in solution)
    rendered = RENDER.render(prompt.model_copy(update={"messages": (*prompt.messages, *said)}))
    runs = groupby(zip(rendered.tokens, rendered.targets, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for emitted, run in runs if emitted]


class Recorded(Sampler):
    """Writes what it is given, one episode after another; `between` is called after each."""

    def __init__(self, written, between=lambda number: None):
        self.written, self.between = written, between

    def play(self, prompts, seeds, sampling, reply):
        for number, written in enumerate(self.written):
            for tokens in written:
                if reply(number, Sampled(tokens, [0.0] * len(tokens), "stop")) is None:
                    break
            self.between(number)


def test_scores_are_those_of_one_episode_after_another():
    # Every third has another task's solution, which does not fit.
    solutions = [TASKS[number - number % 3]["solution"] for number in range(len(TASKS))]
    written = [turns(task, solution) for task, solution in zip(TASKS, solutions, strict=True)]
    expected = []
    for task, its_turns in zip(TASKS, written, strict=True):
        environment = start(task)
        for tokens in its_turns:
            if not environment.respond(RENDER.parse(tokens)):
                break
        expected.append(environment.score())
    played = run_episodes(Recorded(written), RENDER, TASKS, [0] * len(TASKS), SAMPLING)
    assert [episode.score for episode in played] == expected
    assert {score.value for score in expected} == {0.0, 1.0}


def test_an_episode_is_scored_while_the_next_one_is_written(monkeypatch):
    scored = [threading.Event() for _ in range(3)]

    class Told:
        def __init__(self, task):
            self.number = TASKS.index(task)

        def respond(self, messages):
            return []

        def score(self):
            scored[self.number].set()
            return Score(float(self.number), {}, None)

    monkeypatch.setattr(module, "start", Told)
    written = [turns(task, task["solution"])[:1] for task in TASKS[:3]]
    waited = []
    sampler = Recorded(written, lambda number: waited.append(scored[number].wait(20)))
    played = run_episodes(sampler, RENDER, TASKS[:3], [0] * 3, SAMPLING)
    assert waited == [True] * 3
    assert [episode.score.value for episode in played] == [0.0, 1.0, 2.0]


def test_a_scorer_that_fails_and_a_sampler_that_fails_are_told(monkeypatch):
    class Broken:
        def __init__(self, task):
            pass

        def respond(self, messages):
            return []

        def score(self):
            raise ZeroDivisionError

    monkeypatch.setattr(module, "start", Broken)
    written = [turns(task, task["solution"])[:1] for task in TASKS[:2]]
    with pytest.raises(ZeroDivisionError):
        run_episodes(Recorded(written), RENDER, TASKS[:2], [0] * 2, SAMPLING)

    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_episodes(Recorded(written, stop), RENDER, TASKS[:2], [0] * 2, SAMPLING)
