"""The sampler against stock generation and against the trainer's own log-probabilities."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.engine import adapters
from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import load_model, trainable, unfreeze_adapter
from posttrain.engine.optimizer import make_optimizer
from posttrain.engine.packing import Item, pack
from posttrain.recipe.types import Lora, Sampling
from posttrain.recipes.quickstart import adamw
from posttrain.rollout.in_process import InProcessSampler, choose
from tests.engine.toys import save_toy

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=24, max_turns=1)
WARM = Sampling(temperature=0.8, top_p=1.0, top_k=None, max_new_tokens=24, max_turns=1)

ADAMW = adamw(0.3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 512, size=length).tolist() for length in (5, 23, 11, 23, 1)]


def test_greedy_tokens_equal_stock_generate(toy, prompts):
    stock = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32, attn_implementation="eager")
    sampler = InProcessSampler(load_model(toy), frozenset({1}), "float32", 4096)
    ours = sampler.sample(prompts, [0] * len(prompts), GREEDY)
    for prompt, sampled in zip(prompts, ours, strict=True):
        out = stock.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=1, pad_token_id=0)
        assert sampled.tokens == out[0, len(prompt) :].tolist()


def test_log_probabilities_equal_the_trainers(toy, prompts):
    model = load_model(toy)
    sampled = InProcessSampler(model, frozenset(range(2, 10)), "float32", 4096).sample(prompts * 3, list(range(15)), WARM)
    assert {sample.ended for sample in sampled} == {"stop", "length"}
    items = [
        Item(np.array(prompt), (np.array(sample.tokens),), (np.ones(len(sample.tokens), bool),))
        for prompt, sample in zip(prompts * 3, sampled, strict=True)
    ]
    with torch.no_grad():
        trainer = batch_logprobs(model, pack(items, 0), "float32", temperature=0.8)
    ours = torch.tensor([value for sample in sampled for value in sample.logprobs])
    torch.testing.assert_close(ours, trainer, atol=1e-4, rtol=0)


def test_it_samples_from_the_weights_as_an_optimizer_step_left_them(toy, prompts):
    model = load_model(toy)
    adapters.attach(model, Lora(kind="lora", rank=4, alpha=8, targets=("q_proj", "experts")))
    unfreeze_adapter(model)
    sampler = InProcessSampler(model, frozenset({1}), "float32", 4096)
    before = sampler.sample(prompts, [0] * 5, WARM)
    parameters = trainable(model)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    make_optimizer(ADAMW, parameters).step()
    after = sampler.sample(prompts, [0] * 5, WARM)
    assert after != before
    items = [
        Item(np.array(prompt), (np.array(sample.tokens),), (np.ones(len(sample.tokens), bool),))
        for prompt, sample in zip(prompts, after, strict=True)
    ]
    with torch.no_grad():
        trainer = batch_logprobs(model, pack(items, 0), "float32", temperature=0.8)
    ours = torch.tensor([value for sample in after for value in sample.logprobs])
    torch.testing.assert_close(ours, trainer, atol=1e-4, rtol=0)


def test_the_same_seeds_give_the_same_bits_and_others_do_not(toy, prompts):
    sampler = InProcessSampler(load_model(toy), frozenset({1}), "float32", 4096)
    first = sampler.sample(prompts, [1, 2, 3, 4, 5], WARM)
    assert sampler.sample(prompts, [1, 2, 3, 4, 5], WARM) == first
    assert sampler.sample(prompts, [6, 7, 8, 9, 10], WARM) != first


def test_a_small_budget_splits_the_batch_and_keeps_the_order(toy, prompts):
    model = load_model(toy)
    whole = InProcessSampler(model, frozenset({1}), "float32", 4096).sample(prompts, [0] * 5, GREEDY)
    split = InProcessSampler(model, frozenset({1}), "float32", 60).sample(prompts, [0] * 5, GREEDY)
    assert [sample.tokens for sample in split] == [sample.tokens for sample in whole]


def test_choose_follows_the_distribution_and_top_p():
    logits_BV = torch.log(torch.tensor([[0.1, 0.6, 0.3]])).expand(1000, 3)
    uniform_B = (np.arange(1000) + 0.5) / 1000
    token_B, logprob_B = choose(logits_BV, uniform_B, Sampling(temperature=1, top_p=1, top_k=None, max_new_tokens=1, max_turns=1))
    assert torch.bincount(token_B).tolist() == [100, 600, 300]
    assert torch.allclose(logprob_B.exp(), torch.tensor([0.1, 0.6, 0.3])[token_B])
    # 0.6 + 0.3 reach 0.8; within them the shares are 2 to 1.
    token_B, _ = choose(logits_BV, uniform_B, Sampling(temperature=1, top_p=0.8, top_k=None, max_new_tokens=1, max_turns=1))
    assert torch.bincount(token_B, minlength=3).tolist() == [0, 667, 333]
    # At temperature 1/2 the shares go as the squares: 1, 36 and 9 of 46.
    token_B, _ = choose(logits_BV, uniform_B, Sampling(temperature=0.5, top_p=1, top_k=None, max_new_tokens=1, max_turns=1))
    assert torch.bincount(token_B).tolist() == pytest.approx([22, 783, 196], abs=1)
