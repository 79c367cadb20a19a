"""The two sides of the GRPO bench, each in a worker process (see `bench.worker`).

`{"prompt": ids, "seed": n}` is one step: a group of `GROUP` completions of `NEW` tokens, their rewards, one update.
With `{"completions": [...], "advantages": [...], "old": logprob}` beside it, the loss of given completions instead.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.toy import ADAMW, VOCABULARY

GROUP, NEW = 8, 128
CLIP = 0.2
Sides = tuple[Callable[[dict[str, Any], bool], float], Callable[[], dict[str, torch.Tensor]]]


def reward(tokens: list[int]) -> float:
    """Share of even tokens: it costs nothing and differs from member to member."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def ours(spec: dict[str, Any]) -> Sides:
    from posttrain.engine import adapters
    from posttrain.engine.forward import batch_logprobs
    from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
    from posttrain.engine.objectives import Rollouts, group_advantages, policy_denominator, policy_sum
    from posttrain.engine.optimizer import make_optimizer
    from posttrain.engine.packing import Item, MicroBatch, pack
    from posttrain.engine.step import train_step
    from posttrain.recipe.types import DrGrpo, Sampling
    from posttrain.rollout.in_process import InProcessSampler

    folder = Path(spec["folder"])
    model = load_model(folder / "base", folder / "adapter")
    unfreeze_adapter(model)
    hold_frozen(model, spec["precision"])
    optimizer = make_optimizer(ADAMW, trainable(model))
    sampler = InProcessSampler(model, frozenset(), spec["precision"], 65536)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=NEW, max_turns=1)
    objective = DrGrpo(kind="dr_grpo", clip_low=CLIP, clip_high=CLIP)

    def step(request: dict[str, Any], update: bool) -> float:
        if update:
            seeds = [request["seed"] * GROUP + member for member in range(GROUP)]
            turns = sampler.sample([request["prompt"]] * GROUP, seeds, sampling)
            completions = [turn.tokens for turn in turns]
            advantages = group_advantages([reward(tokens) for tokens in completions])
            old_N = torch.tensor([value for turn in turns for value in turn.logprobs])
        else:
            completions, advantages = request["completions"], request["advantages"]
            old_N = torch.full((sum(map(len, completions)),), request["old"])
        advantage_S = torch.tensor(advantages)
        item = Item(
            np.array(request["prompt"]),
            tuple(map(np.array, completions)),
            tuple(np.ones(len(tokens), bool) for tokens in completions),
        )

        def loss_sum(logprob_N: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
            rollouts = Rollouts(old_N, advantage_S[batch.sequence_N], batch.sequence_N, len(batch.sequences))
            return policy_sum(objective, logprob_N, rollouts, 0.0), {}

        denominator = policy_denominator(objective, len(completions), NEW, len(old_N))
        if not update:
            batch = pack([item], 0)
            loss = loss_sum(batch_logprobs(model, batch, spec["precision"]), batch)[0] / denominator
            loss.backward()
            return loss.item()
        return train_step(
            model,
            optimizer,
            [item],
            loss_sum,
            denominator,
            learning_rate=ADAMW.learning_rate,
            clip_norm=ADAMW.clip_norm,
            precision=spec["precision"],
            micro_batch_tokens=8192,
            step=1,
        ).loss

    def gradients() -> dict[str, torch.Tensor]:
        for _, module in adapters.adapted(model):
            module.lora_A.data, module.lora_B.data = module.lora_A.grad, module.lora_B.grad
        return adapters.to_peft(model)

    return step, gradients


def trl(spec: dict[str, Any]) -> Sides:
    from datasets import Dataset
    from peft import PeftModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    folder = Path(spec["folder"])
    half = spec["precision"] == "bfloat16"
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation="eager",
        experts_implementation=spec["experts"],
    )
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="dr_grpo",
        scale_rewards=False,
        epsilon=CLIP,
        beta=0.0,
        bf16=half,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=spec["recompute"],
        disable_tqdm=True,
        router_aux_loss_coef=0.0,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=lambda completion_ids, **_: [reward(tokens) for tokens in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": ["t2 t3"] * GROUP}),
        processing_class=tokenizer,
    )
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=ADAMW.learning_rate, eps=ADAMW.epsilon, weight_decay=0.0, fused=True)
    trainer.optimizer = optimizer
    trainer.current_gradient_accumulation_steps = 1
    model.train()

    def step(request: dict[str, Any], update: bool) -> float:
        if not update:
            completion_ids = torch.tensor(request["completions"])
            prompt_ids = torch.tensor([request["prompt"]] * GROUP)
            inputs = {
                "prompt_ids": prompt_ids,
                "prompt_mask": torch.ones_like(prompt_ids),
                "completion_ids": completion_ids,
                "completion_mask": torch.ones_like(completion_ids),
                "advantages": torch.tensor(request["advantages"]),
                "old_per_token_logps": torch.full(completion_ids.shape, request["old"]),
                "num_items_in_batch": torch.tensor(completion_ids.numel()),
            }
            loss = trainer.compute_loss(trainer.model_wrapped, inputs)
            loss.backward()
            return loss.item()
        torch.manual_seed(request["seed"])
        text = " ".join(f"t{token}" for token in request["prompt"])
        loss = trainer.training_step(trainer.model_wrapped, [{"prompt": text}] * GROUP, None).item()
        torch.nn.utils.clip_grad_norm_(trained, ADAMW.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def gradients() -> dict[str, torch.Tensor]:
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None)
        return {name.replace(".default", ""): p.grad.contiguous() for name, p in named if ".ref." not in name}

    return step, gradients
