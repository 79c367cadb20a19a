"""Requests that join and leave a batch at work: each gets what it would get alone."""

import queue
import threading
import time

import numpy as np
import pytest
import torch

from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import load_model
from posttrain.engine.packing import Item, pack
from posttrain.errors import Stopped
from posttrain.recipe.types import Sampling
from posttrain.rollout import live as module
from posttrain.rollout.in_process import InProcessSampler
from posttrain.rollout.live import Live, Request, Token, Worker
from posttrain.rollout.sampler import Sampled
from tests.engine.toys import save_toy

STOPS = frozenset(range(2, 6))
KINDS = [(0.0, 1.0, None), (0.8, 1.0, None), (1.0, 0.7, None), (1.2, 1.0, 5)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_model(save_toy(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.close()


def sampling(kind, tokens):
    temperature, top_p, top_k = kind
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=tokens, max_turns=1)


def asked(prompt, seed, how, **more):
    """A request and the queue that hears of it."""
    heard = queue.SimpleQueue()
    return Request(0, np.random.default_rng(seed), prompt, how, STOPS, deliver=heard.put, **more), heard


def answer(heard):
    """The tokens one by one, and the end."""
    tokens = []
    while isinstance(told := heard.get(timeout=20), Token):
        tokens.append(told)
    if isinstance(told, Exception):
        raise told
    return tokens, told


def draws(count, seed):
    rng = np.random.default_rng(seed)
    for number in range(count):
        prompt = rng.integers(6, 512, size=rng.integers(1, 60)).tolist()
        yield prompt, number, sampling(KINDS[number % 4], int(rng.integers(1, 50)))


def alone(model, prompt, seed, how):
    [sampled] = InProcessSampler(model, STOPS, "float32", 4096).sample([prompt], [seed], how)
    return sampled


@pytest.mark.parametrize("budget", [1 << 16, 300], ids=["roomy", "tight"])
def test_whoever_arrives_while_others_decode_gets_what_it_gets_alone(toy, worker, budget):
    live = Live(toy, "float32", budget)
    waits = np.random.default_rng(1).exponential(0.004, size=40)
    heard = []
    for (prompt, seed, how), wait_s in zip(draws(40, 0), waits, strict=True):
        request, ear = asked(prompt, seed, how)
        worker.submit(live, [request])
        heard.append((prompt, seed, how, ear))
        time.sleep(wait_s)
    for prompt, seed, how, ear in heard:
        tokens, sampled = answer(ear)
        expected = alone(toy, prompt, seed, how)
        assert (sampled.tokens, sampled.ended) == (expected.tokens, expected.ended)
        assert [token.number for token in tokens] == sampled.tokens
        assert sampled.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_batch_follows_what_is_asked_of_it(toy):
    """Slots and positions grow with arrivals, shrink with ends, and stay within the budget."""
    live = Live(toy, "float32", 1000)
    ears = []
    for prompt, seed, how in draws(12, 3):
        request, ear = asked(prompt, seed, how)
        live.arrived.append(request)
        ears.append((prompt, seed, how, ear))
        live.advance()
        assert live.cache.slots * live.cache.positions <= 1000 or live.cache.slots == 1
    long, ear = asked([9] * 30, 5, sampling(KINDS[1], 1200))
    live.arrived.append(long)
    seen = set()
    while live.busy:
        live.advance()
        seen.add((live.cache.slots, long in live.slots))
    assert {slots for slots, has_long in seen if has_long} == {1}
    assert max(slots for slots, _ in seen) > 1
    assert answer(ear)[1].tokens == alone(toy, [9] * 30, 5, sampling(KINDS[1], 1200)).tokens
    for prompt, seed, how, ear in ears:
        assert answer(ear)[1].tokens == alone(toy, prompt, seed, how).tokens


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(toy, monkeypatch):
    monkeypatch.setattr(module, "MOST_SLOTS", 2)
    live = Live(toy, "float32", 1 << 16)
    endless = sampling(KINDS[1], 3000)
    first, _ = asked([7, 8, 9], 1, endless)
    second, _ = asked([7, 8], 2, endless)
    third, late = asked([10, 11], 3, sampling(KINDS[1], 20))
    for request in (first, second, third):
        request.stops = frozenset()
        live.arrived.append(request)
    for _ in range(5):
        live.advance()
    assert third in live.arrived and late.empty()
    second.cancelled = True
    live.advance()
    assert third in live.slots and second not in live.slots
    while third in live.slots:
        live.advance()
    [expected] = InProcessSampler(toy, frozenset(), "float32", 4096).sample([[10, 11]], [3], sampling(KINDS[1], 20))
    assert answer(late)[1].tokens == expected.tokens
    first.cancelled = True
    live.advance()
    assert not live.busy


def test_the_likeliest_tokens_and_those_of_a_prompt(toy, worker):
    live = Live(toy, "float32", 4096)
    prompt = [7, 30, 41, 9, 100, 7]
    tokens = worker.call(lambda: live.prompt_tokens(prompt, 3)).result(60)
    assert [token.number for token in tokens] == prompt[1:]
    item = Item(np.array(prompt[:1]), (np.array(prompt[1:]),), (np.ones(5, bool),))
    with torch.no_grad():
        expected = batch_logprobs(toy, pack([item], 0), "float32")
    assert [token.logprob for token in tokens] == pytest.approx(expected.tolist(), abs=1e-4)
    request, ear = asked(prompt, 0, sampling(KINDS[0], 4), likeliest=3)
    worker.submit(live, [request])
    for token in answer(ear)[0]:
        assert token.likeliest[0] == (token.number, pytest.approx(token.logprob, abs=1e-5))
        assert len(token.likeliest) == 3 and token.likeliest[1][1] <= token.likeliest[0][1]


def test_a_fault_and_a_stop_are_told_to_those_who_wait(toy):
    worker, live = Worker(), Live(toy, "float32", 4096)
    request, ear = asked([10**9], 0, sampling(KINDS[0], 4))
    worker.submit(live, [request])
    with pytest.raises(IndexError):
        answer(ear)
    request, ear = asked([7, 8], 0, sampling(KINDS[0], 10))
    worker.submit(live, [request])
    assert isinstance(answer(ear)[1], Sampled)
    request, ear = asked([7, 8], 0, sampling(KINDS[0], 100_000))
    worker.submit(live, [request])
    threading.Timer(0.2, worker.close).start()
    with pytest.raises(Stopped):
        answer(ear)
