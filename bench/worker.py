"""One side of a training bench in a process of its own, so that its peak memory is its own.

Reads a JSON request per line, answers a JSON line: `{"rows": [...]}` is one optimizer step, `{"pairs": [...]}` the pass
of the reference over all pairs and a step of every `PAIRS_PER_STEP`, `{"gradients": path}` beside them stores gradients
of all of it instead of stepping, `{"stop": true}` ends it.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.toy import ADAMW, VOCABULARY
from posttrain.host import machine

BETA = 0.1
PAIRS_PER_STEP = 4
MICRO_BATCH_TOKENS = 8192
Step = Callable[[dict[str, Any], bool], float]
"""(request, whether to update) → loss. Without an update the gradients stay."""


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Imported here as it is one more pair of sides, and this file is the program.
    from bench import grpo_worker

    sides = grpo_worker if spec["objective"] == "grpo" else sys.modules[__name__]
    step, gradients = getattr(sides, spec["side"])(spec)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if "stop" in request:
            break
        started = time.perf_counter()
        loss = step(request, "gradients" not in request)
        seconds = time.perf_counter() - started
        if "gradients" in request:
            save_file(gradients(), request["gradients"])
        print(json.dumps({"loss": loss, "seconds": seconds, "peak_bytes": machine.peak_bytes()}), file=answers)


def ours(spec: dict[str, Any]) -> tuple[Step, Callable[[], dict[str, torch.Tensor]]]:
    from posttrain.engine import adapters
    from posttrain.engine.device import fuse_layers
    from posttrain.engine.forward import batch_logprobs, sequence_logprobs
    from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
    from posttrain.engine.objectives import Pairs, preference_sum, sequence_lengths, sequence_sums, sft_sum
    from posttrain.engine.optimizer import make_optimizer
    from posttrain.engine.packing import Item, MicroBatch, pack
    from posttrain.engine.step import train_step
    from posttrain.host.machine import keep_freed_memory
    from posttrain.recipe.types import Ipo

    keep_freed_memory()
    folder = Path(spec["folder"])
    model = load_model(folder / "base", folder / "adapter")
    unfreeze_adapter(model)
    hold_frozen(model, spec["precision"])
    fuse_layers(model, spec["precision"])
    optimizer = make_optimizer(ADAMW, trainable(model))
    none = np.empty(0, np.int64)

    def as_items(request: dict[str, Any]) -> list[Item]:
        if "rows" in request:
            return [Item(none, (np.array(row),), (np.ones(len(row), bool),)) for row in request["rows"]]
        return [
            Item(np.array(prompt), (np.array(a), np.array(b)), (np.ones(len(a), bool), np.ones(len(b), bool)))
            for prompt, a, b in request["pairs"]
        ]

    def step(request: dict[str, Any], update: bool) -> float:
        items = as_items(request)
        if "rows" in request:
            return one_step(items, None, update)
        sums_S, _ = sequence_logprobs(model, items, spec["precision"], MICRO_BATCH_TOKENS)
        reference_P2 = sums_S.view(-1, 2)
        if not update:
            return one_step(items, reference_P2, update)
        starts = range(0, len(items), PAIRS_PER_STEP)
        parts = (slice(start, start + PAIRS_PER_STEP) for start in starts)
        return [one_step(items[part], reference_P2[part], update) for part in parts][-1]

    def one_step(items: list[Item], reference_P2: torch.Tensor | None, update: bool) -> float:
        def loss_sum(logprob_N: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
            if reference_P2 is None:
                return sft_sum(logprob_N), {}
            first, stop = batch.sequences.start, batch.sequences.stop
            owner_N = batch.sequence_N - first
            sums = sequence_sums(logprob_N, owner_N, stop - first).view(-1, 2)
            pairs = Pairs(
                sums, sequence_lengths(owner_N, stop - first).view(-1, 2), reference_P2[first // 2 : stop // 2]
            )
            return preference_sum(Ipo(kind="ipo", beta=BETA), pairs), {}

        # A row's first token is no target.
        denominator = sum(item.num_targets - 1 for item in items) if reference_P2 is None else len(items)
        if not update:
            batch = pack(items, 0)
            total, _ = loss_sum(batch_logprobs(model, batch, spec["precision"]), batch)
            (total / denominator).backward()
            return total.item() / denominator
        report = train_step(
            model,
            optimizer,
            items,
            loss_sum,
            denominator,
            learning_rate=ADAMW.learning_rate,
            clip_norm=ADAMW.clip_norm,
            precision=spec["precision"],
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            step=1,
        )
        return report.loss

    def gradients() -> dict[str, torch.Tensor]:
        for _, module in adapters.adapted(model):
            module.lora_A.data, module.lora_B.data = module.lora_A.grad, module.lora_B.grad
        return adapters.to_peft(model)

    return step, gradients


def trl(spec: dict[str, Any]) -> tuple[Step, Callable[[], dict[str, torch.Tensor]]]:
    from datasets import Dataset
    from peft import PeftModel
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    folder = Path(spec["folder"])
    half = spec["precision"] == "bfloat16"
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation="eager",
        experts_implementation=spec["experts"],
    )
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")), pad_token="t0", eos_token="t1"
    )
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 8,
        "bf16": half,
        "use_cpu": True,
        "report_to": "none",
        "max_length": None,
        "gradient_checkpointing": spec["recompute"],
        "disable_tqdm": True,
        "router_aux_loss_coef": 0.0,
    }
    if spec["objective"] == "sft":
        rows = Dataset.from_dict({"input_ids": [[2, 3, 4]] * 8})
        config = SFTConfig(**arguments, padding_free=spec["packed"])
        trainer: Any = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    else:
        text = Dataset.from_dict({"prompt": ["t2 t3"] * 8, "chosen": ["t4"] * 8, "rejected": ["t5"] * 8})
        config = DPOConfig(**arguments, loss_type="ipo", beta=BETA, padding_free=False)
        trainer = DPOTrainer(model=model, args=config, train_dataset=text, processing_class=tokenizer)
        # As if computed by the trainer before its first step, which it does with the data set that it is given.
        trainer.precompute_ref_logps = spec["ahead"]
    if spec["recompute"]:
        # `Trainer.train` does this, which is not called here.
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=ADAMW.learning_rate, eps=ADAMW.epsilon, weight_decay=0.0, fused=True)
    trainer.optimizer = optimizer
    trainer.current_gradient_accumulation_steps = 1

    def examples(request: dict[str, Any]) -> list[dict[str, Any]]:
        if "rows" in request:
            return [{"input_ids": row} for row in request["rows"]]
        return [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b} for p, a, b in request["pairs"]]

    def step(request: dict[str, Any], update: bool) -> float:
        given = examples(request)
        if not update or "rows" in request:
            return one_step(given, update)
        starts = range(0, len(given), PAIRS_PER_STEP)
        if spec["ahead"]:
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator(given))
            for example, first, second in zip(given, chosen.tolist(), rejected.tolist(), strict=True):
                example |= {"ref_chosen_logps": first, "ref_rejected_logps": second}
        return [one_step(given[start : start + PAIRS_PER_STEP], update) for start in starts][-1]

    def one_step(given: list[dict[str, Any]], update: bool) -> float:
        inputs = trainer.data_collator(given)
        loss = trainer.training_step(trainer.model_wrapped, inputs).item()
        if update:
            torch.nn.utils.clip_grad_norm_(trained, ADAMW.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def gradients() -> dict[str, torch.Tensor]:
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None)
        return {name.replace(".default", ""): p.grad.contiguous() for name, p in named if ".ref." not in name}

    return step, gradients


if __name__ == "__main__":
    main()
