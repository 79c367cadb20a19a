"""One contract for every sampler: against stock generation, the trainer's own log-probabilities, and each other.

The remote one talks to the project's own server on loopback, which samples with the in-process one.
"""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.engine import adapters
from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import load_model, trainable, unfreeze_adapter
from posttrain.engine.optimizer import make_optimizer
from posttrain.engine.packing import Item, pack
from posttrain.errors import InputError, MachineError
from posttrain.recipe.types import Lora, Sampling
from posttrain.recipes.quickstart import adamw
from posttrain.rollout import in_process
from posttrain.rollout.in_process import InProcessSampler, choose
from posttrain.rollout.remote import RemoteSampler
from posttrain.run.folder import ASSETS
from tests.engine.toys import save_toy
from tests.rollout.server import serve

STOPS = frozenset(range(2, 10))
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=24, max_turns=1)
WARM = GREEDY.model_copy(update={"temperature": 0.8})
ONE = GREEDY.model_copy(update={"temperature": 1.0, "max_new_tokens": 1})
LORA = Lora(kind="lora", rank=4, alpha=8, targets=("q_proj", "experts"))
ADAMW = adamw(0.3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = save_toy(tmp_path_factory.mktemp("toy"))
    shutil.copy(ASSETS / "tiny_base" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 512, size=length).tolist() for length in (5, 23, 11, 23, 1)]


@pytest.fixture(scope="module", params=["in_process", "remote"])
def make_sampler(request, toy, tmp_path_factory):
    """stop tokens → sampler of the toy."""
    if request.param == "in_process":
        yield lambda stops: InProcessSampler(load_model(toy), stops, "float32", 4096)
    else:
        with serve(toy, tmp_path_factory.mktemp("runs")) as server:
            yield partial(RemoteSampler, server.url, first_wait_s=0.01)


def trainers_logprobs(model, prompts, turns, temperature):
    items = [
        Item(np.array(prompt), (np.array(sample.tokens),), (np.ones(len(sample.tokens), bool),))
        for prompt, sample in zip(prompts, turns, strict=True)
    ]
    with torch.no_grad():
        return batch_logprobs(model, pack(items, 0), "float32", temperature)


def logprobs_of(turns):
    return torch.tensor([value for sample in turns for value in sample.logprobs])


def test_greedy_tokens_equal_stock_generate(make_sampler, toy, prompts):
    stock = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32, attn_implementation="eager")
    ours = make_sampler(frozenset({1})).sample(prompts, [0] * len(prompts), GREEDY)
    for prompt, sampled in zip(prompts, ours, strict=True):
        out = stock.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=1, pad_token_id=0)
        assert sampled.tokens == out[0, len(prompt) :].tolist()


def test_log_probabilities_equal_the_trainers(make_sampler, toy, prompts):
    turns = make_sampler(STOPS).sample(prompts * 3, list(range(15)), WARM)
    assert {sample.ended for sample in turns} == {"stop", "length"}
    trainer = trainers_logprobs(load_model(toy), prompts * 3, turns, 0.8)
    torch.testing.assert_close(logprobs_of(turns), trainer, atol=1e-4, rtol=0)


def test_the_same_seeds_give_the_same_bits_and_others_do_not(make_sampler, prompts):
    sampler = make_sampler(frozenset({1}))
    first = sampler.sample(prompts[:1], [1], WARM)
    assert sampler.sample(prompts[:1], [1], WARM) == first
    assert sampler.sample(prompts[:1], [6], WARM) != first


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_further_turns_see_all_that_was_before(make_sampler, toy, prompts, sampling):
    """Every prompt has three turns, with replies of several lengths between them."""
    sampler, told = make_sampler(STOPS), {}

    def reply(number, sampled):
        turns = told.setdefault(number, [])
        turns.append(sampled)
        return [300 + number] * (1 + 7 * number) if len(turns) < 3 else None

    sampler.play(prompts, [1, 2, 3, 4, 5], sampling.model_copy(update={"max_new_tokens": 9}), reply)
    for number, prompt in enumerate(prompts):
        tokens, sampled, values = list(prompt), [False] * len(prompt), []
        for turn in told[number]:
            tokens += turn.tokens + [300 + number] * (1 + 7 * number)
            sampled += [True] * len(turn.tokens) + [False] * (1 + 7 * number)
            values += turn.logprobs
        item = Item(np.empty(0, np.int64), (np.array(tokens),), (np.array(sampled),))
        with torch.no_grad():
            trainer = batch_logprobs(load_model(toy), pack([item], 0), "float32", sampling.temperature or 1.0)
        torch.testing.assert_close(torch.tensor(values), trainer, atol=1e-4, rtol=0)


def test_top_k_and_top_p_leave_out_what_is_unlikely(make_sampler, toy, prompts):
    with torch.no_grad():
        model = load_model(toy)
        row = pack([Item(np.empty(0, np.int64), (np.array([*prompts[1], 0]),), (np.ones(24, bool),))], 0)
        hidden = model.get_decoder()(input_ids=row.input_ids_1T, position_ids=row.position_ids_1T, plan=row.plan)
        probability_V = torch.softmax(model.lm_head(hidden.last_hidden_state[0, 22]), -1)
    order = probability_V.argsort(descending=True).tolist()
    needed = 1 + int((probability_V.sort(descending=True).values.cumsum(0) < 0.5).sum())
    for change, allowed in (({"top_k": 3}, order[:3]), ({"top_p": 0.5}, order[:needed])):
        turns = make_sampler(frozenset()).sample([prompts[1]] * 200, range(200), ONE.model_copy(update=change))
        assert {sample.tokens[0] for sample in turns} <= set(allowed)
        assert len({sample.tokens[0] for sample in turns}) > 1


@pytest.mark.parametrize("budget", [60, 100, 4096])
def test_how_many_slots_there_are_changes_no_token(toy, prompts, budget):
    """With few slots they are refilled as they become free, and equal prompts meet in different batches."""
    several = [prompt for prompt in prompts for _ in range(6)]
    sampler = InProcessSampler(load_model(toy), STOPS, "float32", budget)
    alone = replace(sampler, position_budget=1)
    turns = sampler.sample(several, range(30), WARM)
    ones = alone.sample(several, range(30), WARM)
    assert [turn.tokens for turn in turns] == [one.tokens for one in ones]
    torch.testing.assert_close(logprobs_of(turns), logprobs_of(ones), atol=1e-5, rtol=0)
    assert sampler.sample(several, range(30), WARM) == turns


def test_a_prompt_is_prefilled_once_for_its_group(toy, prompts, monkeypatch):
    seen = []
    forward = in_process.Batch._forward
    monkeypatch.setattr(in_process.Batch, "_forward", lambda batch, turns: seen.extend(turns) or forward(batch, turns))
    several = [prompt for prompt in prompts for _ in range(6)]
    InProcessSampler(load_model(toy), STOPS, "float32", 100).sample(several, range(30), WARM)
    assert [list(turn.new) for turn in seen] == prompts


def test_it_samples_from_the_weights_as_an_optimizer_step_left_them(toy, prompts):
    model = load_model(toy)
    adapters.attach(model, LORA)
    unfreeze_adapter(model)
    sampler = InProcessSampler(model, frozenset({1}), "float32", 4096)
    before = sampler.sample(prompts, [0] * 5, WARM)
    parameters = trainable(model)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    make_optimizer(ADAMW, parameters).step()
    after = sampler.sample(prompts, [0] * 5, WARM)
    assert after != before
    trainer = trainers_logprobs(model, prompts, after, 0.8)
    torch.testing.assert_close(logprobs_of(after), trainer, atol=1e-4, rtol=0)


def test_choose_follows_the_distribution_and_top_p():
    logits_BV = torch.log(torch.tensor([[0.1, 0.6, 0.3]])).expand(1000, 3)
    uniform_B = (np.arange(1000) + 0.5) / 1000
    token_B, logprob_B = choose(logits_BV, uniform_B, ONE)
    assert torch.bincount(token_B).tolist() == [100, 600, 300]
    assert torch.allclose(logprob_B.exp(), torch.tensor([0.1, 0.6, 0.3])[token_B])
    # 0.6 + 0.3 reach 0.8; within them the shares are 2 to 1.
    token_B, _ = choose(logits_BV, uniform_B, ONE.model_copy(update={"top_p": 0.8}))
    assert torch.bincount(token_B, minlength=3).tolist() == [0, 667, 333]
    # At temperature 1/2 the shares go as the squares: 1, 36 and 9 of 46.
    token_B, _ = choose(logits_BV, uniform_B, ONE.model_copy(update={"temperature": 0.5}))
    assert torch.bincount(token_B).tolist() == pytest.approx([22, 783, 196], abs=1)
    # The two likeliest, 2 to 1.
    token_B, _ = choose(logits_BV, uniform_B, ONE.model_copy(update={"top_k": 2}))
    assert torch.bincount(token_B, minlength=3).tolist() == [0, 667, 333]


# ---------------------------------------------------------------- servers that fail


def test_a_dropped_connection_is_tried_again(toy, prompts, tmp_path):
    with serve(toy, tmp_path) as server:
        sampler = RemoteSampler(server.url, STOPS, first_wait_s=0.01)
        server.drop = 2
        turns = sampler.sample(prompts[:1], [0], GREEDY)
        assert server.drop == 0
        assert turns == InProcessSampler(load_model(toy), STOPS, "float32", 4096).sample(prompts[:1], [0], GREEDY)


def test_an_episode_without_an_answer_is_lost_and_says_where(toy, prompts, tmp_path):
    with serve(toy, tmp_path) as server:
        sampler = RemoteSampler(server.url, STOPS, first_wait_s=0.01)
        server.refused_length = len(prompts[0])
        turns = sampler.sample(prompts[:3], [0, 0, 0], GREEDY)
        assert [turn.ended == "lost" for turn in turns] == [True, False, False]
        assert turns[0].tokens == [] and server.url in turns[0].reason and "answered 503, 4 times" in turns[0].reason
        with pytest.raises(MachineError, match=f"none of 1 prompts: sampler {server.url}"):
            sampler.sample(prompts[:1], [0], GREEDY)


def test_a_group_that_lost_a_member_is_trained_on_the_others(toy, prompts):
    model, none = load_model(toy), np.empty(0, np.int64)
    members = [np.array([5, 6, 7]), none, np.array([8])]
    masks = [np.ones(len(ids), bool) for ids in members]
    whole = pack([Item(np.array(prompts[0]), tuple(members), tuple(masks))], 0)
    rest = pack([Item(np.array(prompts[0]), (members[0], members[2]), (masks[0], masks[2]))], 0)
    assert whole.sequence_N.tolist() == [0, 0, 0, 2] and rest.sequence_N.tolist() == [0, 0, 0, 1]
    with torch.no_grad():
        assert torch.equal(batch_logprobs(model, whole, "float32"), batch_logprobs(model, rest, "float32"))


def test_a_server_that_does_not_answer_in_time_is_named(toy, prompts, tmp_path):
    with serve(toy, tmp_path) as server:
        sampler = RemoteSampler(server.url, STOPS, first_wait_s=0.01, timeout_s=0.2)
        server.delay_s = 1.0
        with pytest.raises(MachineError, match=f"{server.url}/v1/completions did not answer within 0.2 s, 4 times"):
            sampler.sample(prompts[:1], [0], GREEDY)


def test_a_server_that_is_not_there_or_knows_no_token_ids_is_named(toy, prompts, tmp_path):
    with serve(toy, tmp_path) as server:
        sampler = RemoteSampler(server.url, STOPS, first_wait_s=0.01)
        server.token_ids = False
        with pytest.raises(InputError, match=f"{server.url} returned no token ids"):
            sampler.sample(prompts[:1], [0], GREEDY)
    with pytest.raises(MachineError, match=f"{server.url}/v1/models dropped the connection"):
        RemoteSampler(server.url, STOPS, first_wait_s=0.01)


def test_adapters_are_loaded_while_the_server_runs(toy, prompts, tmp_path):
    model = load_model(toy)
    adapters.attach(model, LORA)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, module in adapters.adapted(model):
            for factor in (module.lora_A, module.lora_B):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
    adapters.save(model, tmp_path / "adapter", "toy")
    with serve(toy, tmp_path) as server:
        sampler = RemoteSampler(server.url, STOPS, first_wait_s=0.01)
        before = sampler.sample(prompts[:1], [1], WARM)
        sampler.load_adapter("one", tmp_path / "adapter")
        turns = sampler.sample(prompts[:1], [1], WARM)
        assert turns == InProcessSampler(model, STOPS, "float32", 4096).sample(prompts[:1], [1], WARM) != before
        sampler.load_adapter("two", tmp_path / "adapter")
        assert server.models == ["base", "two"]
        sampler.drop_adapter()
        assert server.models == ["base"]
        assert sampler.sample(prompts[:1], [1], WARM) == before
        with pytest.raises(InputError, match="refused the request: 404"):
            sampler.load_adapter("three", tmp_path / "missing")
