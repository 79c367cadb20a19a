"""SFT steps beside stock transformers + PEFT on the same weights, adapter and row: `python -m bench.gpu.peer`.

A few layers of the 20B model's shape, because PEFT builds a dense delta and a dense gradient for all experts. First
both must compute the same; then they take turns. Every cell of the peer is shown.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GptOssForCausalLM

from bench.gpu import model as shape
from bench.gpu.sft import document, facts
from posttrain.engine import adapters
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.objectives import sft_sum
from posttrain.engine.optimizer import make_optimizer
from posttrain.engine.step import train_step
from posttrain.host import machine
from posttrain.recipe.types import Execution

CELLS = [
    (attention, experts, recompute)
    for attention in ("flex_attention", "eager")
    for experts in ("grouped_mm", "eager")
    for recompute in (False, True)
]
Step = Callable[[int], float]
"""Number of the row → loss; one update."""


def ours(model: Any, tokens: int) -> Step:
    optimizer = shape.optimizer_of(model)

    def step(number: int) -> float:
        return train_step(
            model,
            optimizer,
            [document(tokens, number)],
            lambda logprob_N, batch: (sft_sum(logprob_N), {}),
            denominator=tokens - 1,
            learning_rate=1e-5,
            clip_norm=1.0,
            precision="bfloat16",
            micro_batch_tokens=tokens,
            step=number,
        ).loss

    return step


def theirs(base: GptOssForCausalLM, adapter: Path, tokens: int, cell: tuple[str, str, bool]) -> tuple[Step, Any]:
    attention, experts, recompute = cell
    base.set_attn_implementation(attention)
    base.set_experts_implementation(experts)
    model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=True)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train(recompute)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = [*named.values()]
    optimizer = make_optimizer(shape.ADAMW, named)

    def step(number: int) -> float:
        ids = torch.from_numpy(document(tokens, number).tokens[0])[None].cuda()
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step, model


def stock(ours_model: Any, layers: int) -> GptOssForCausalLM:
    """transformers' own model on our weights' own memory."""
    with torch.device("meta"):
        model = GptOssForCausalLM(shape.config(layers, stock=True)).to(torch.bfloat16)
    weights = {name.replace(".base.", "."): p for name, p in ours_model.state_dict().items() if "lora_" not in name}
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in weights.items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to("cuda")
    return model.requires_grad_(False)


def timed(step: Step, number: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    loss = step(number)
    torch.cuda.synchronize()
    return time.perf_counter() - started, loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.peer", description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine.set_thread_environment(8)
    prepare_device(Execution(device="cuda"), "bfloat16")
    model = shape.make(options.layers, options.rank, packed=False)
    fuse_layers(model, "bfloat16")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place)
        adapters.save(model, adapter, "")
        our_step = ours(model, options.tokens)
        first_loss = timed(our_step, 0)[1]
        timed(our_step, 1)
        for cell in CELLS:
            name = " ".join((*cell[:2], "recompute" if cell[2] else "")).strip()
            base, peer = stock(model, options.layers), None
            try:
                shape.clear()
                step, peer = theirs(base, adapter, options.tokens, cell)
                loss = timed(step, 0)[1]
                row = {"cell": name, "loss": loss, "loss_difference": abs(loss - first_loss)}
                if row["loss_difference"] > 1e-3 * abs(loss):
                    raise RuntimeError(f"first losses {first_loss} and {loss}: the two sides compute different things")
                timed(step, 1)
                pairs = []
                for number in range(options.steps):
                    pairs.append((timed(our_step, number)[0], timed(step, number)[0]))
                ratios = [peer_s / our_s for our_s, peer_s in pairs]
                row |= {
                    "tokens_per_second": options.tokens / statistics.median(peer_s for _, peer_s in pairs),
                    "ours_tokens_per_second": options.tokens / statistics.median(our_s for our_s, _ in pairs),
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                    "peak_bytes": torch.cuda.max_memory_allocated(),
                }
                print(
                    f"{name:40} {row['tokens_per_second']:8.0f} tok/s, ours {row['ours_tokens_per_second']:8.0f}: "
                    f"{row['ratio']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), "
                    f"first losses {first_loss:.4f} and {loss:.4f}",
                    flush=True,
                )
            except (
                RuntimeError,
                ValueError,
            ) as error:  # Out of memory, or refused: a row of the table, too.
                row = {"cell": name, "error": f"{type(error).__name__}: {error}"[:400]}
                print(f"{name:40} {row['error'][:160]}", flush=True)
            rows.append(row)
            del base, peer
    result = {**facts(), **{key: getattr(options, key) for key in ("layers", "rank", "tokens")}, "rows": rows}
    (options.out / "gpu_peer.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
