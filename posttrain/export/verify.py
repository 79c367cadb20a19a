"""Prove that an export is the model it came from, in the programs that will load it.

Axes: T the last positions of a prompt, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.utils import logging as transformers_logging

from posttrain.engine.forward import hidden_states
from posttrain.engine.model import load_model
from posttrain.engine.packing import Item, pack
from posttrain.errors import MachineError, ModelError
from posttrain.export.gguf_layout import yarn_is_rounded
from posttrain.export.gguf_types import GgufType
from posttrain.export.llama import ask_llama
from posttrain.export.tensors import TensorFolder
from posttrain.export.weights import read_config
from posttrain.recipe.types import Tolerances

POSITIONS = 64
"""Logits are compared at so many last positions of each prompt: all of a large model's would not fit in memory."""
Logits = list[torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """Two programs or files on the same prompts; `greedy_agreement` is the share of positions with the same first
    choice, for GGUF the share of prompts whose whole continuation agrees."""

    pair: str
    prompts: int
    status: Literal["agrees", "differs", "measured", "unverified"]
    max_abs: float | None = None
    mean_abs: float | None = None
    kl: float | None = None
    greedy_agreement: float | None = None
    left_perplexity: float | None = None
    """Of the prompts themselves, by the first of the pair."""
    right_perplexity: float | None = None
    reason: str | None = None

    def row(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def stock_logits(base: Path, adapter: Path | None, prompts: list[list[int]], arithmetic: torch.dtype) -> Logits:
    """Logits [T, V] of stock transformers, with the adapter on it in stock PEFT.

    Raises MachineError where PEFT is needed and not installed.
    """
    model = stock = _stock_model(base)
    if adapter is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MachineError("PEFT was not asked: it is not installed (pip install peft)") from error
        model = PeftModel.from_pretrained(model, adapter)
    widen(stock, arithmetic)
    return [model(input_ids=torch.tensor([prompt])).logits[0, -POSITIONS:].clone() for prompt in prompts]


def _stock_model(folder: Path) -> Any:
    """With weights as they are stored, MXFP4 as the bfloat16 that it stands for."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    packed = (read_config(folder).get("quantization_config") or {}).get("quant_method") == "mxfp4"
    settings = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    stored = {spec.dtype for spec in TensorFolder(folder).specs.values() if spec.dtype.is_floating_point}
    dtype = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **settings
    )
    return model.eval()


def widen(model: Any, arithmetic: torch.dtype) -> None:
    """Compute in `arithmetic`, which holds every stored value.

    Each layer is widened while it runs and no longer, so that a large model is never held in it as a whole.
    """
    layers = list(model.get_decoder().layers)
    within = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    for tensor in _tensors(model):
        if id(tensor) not in within:
            tensor.data = tensor.data.to(arithmetic)
    stored: dict[int, torch.Tensor] = {}

    def before(layer: nn.Module, *call: Any) -> None:
        for tensor in _tensors(layer):
            stored[id(tensor)] = tensor.data
            tensor.data = tensor.data.to(arithmetic)

    def after(layer: nn.Module, *call: Any) -> None:
        for tensor in _tensors(layer):
            tensor.data = stored.pop(id(tensor))

    for layer in layers:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]


@torch.no_grad()
def engine_logits(base: Path, adapter: Path | None, prompts: list[list[int]], arithmetic: torch.dtype) -> Logits:
    """Logits [T, V] of the engine that trained the adapter."""
    model: Any = load_model(base, adapter, precision="bfloat16")
    widen(model, arithmetic)
    nothing = np.zeros(0, np.int64)
    logits = []
    for prompt in prompts:
        batch = pack([Item(nothing, (np.array(prompt),), (np.zeros(len(prompt), bool),))], 0)
        logits.append(model.lm_head(hidden_states(model, batch)[-POSITIONS:]))
    return logits


def perplexity(logprobs: list[torch.Tensor]) -> float:
    return float(torch.cat(logprobs).double().mean().neg().exp())


def prompt_logprobs(logits: Logits, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of each prompt's own tokens, as its last positions foretell them; the last position foretells none of them."""
    found = []
    for logits_TV, prompt in zip(logits, prompts, strict=True):
        count = len(logits_TV) - 1
        targets_T = torch.tensor(prompt[len(prompt) - count :], dtype=torch.int64)
        found.append(torch.log_softmax(logits_TV[:-1].double(), -1).gather(-1, targets_T[:, None])[:, 0])
    return found


def compare(
    pair: str,
    left: Logits,
    right: Logits,
    prompts: list[list[int]],
    max_abs: float | None = None,
    kl: float | None = None,
) -> Comparison:
    """Differences over all positions; KL is of `right` from `left`, mean per position, in nats.

    `max_abs` and `kl` are the limits to judge by; without any the row is measured only.
    """
    differences, divergences, same = [], [], []
    for left_TV, right_TV in zip(left, right, strict=True):
        differences.append((left_TV.double() - right_TV.double()).abs())
        log_left, log_right = torch.log_softmax(left_TV.double(), -1), torch.log_softmax(right_TV.double(), -1)
        divergences.append((log_left.exp() * (log_left - log_right)).sum(-1))
        same.append(left_TV.argmax(-1) == right_TV.argmax(-1))
    largest = max(float(difference.max()) for difference in differences)
    count = sum(difference.numel() for difference in differences)
    divergence = float(torch.cat(divergences).mean())
    status: Literal["agrees", "differs", "measured"] = "measured"
    reason = None
    for what, found, limit in (("logits differ by", largest, max_abs), ("the KL is", divergence, kl)):
        # A NaN is not within any limit.
        if limit is not None and not found <= limit:
            status, reason = "differs", f"{what} {found:.3g}, the limit is {limit:.3g}"
        elif limit is not None and status == "measured":
            status = "agrees"
    return Comparison(
        pair=pair,
        prompts=len(left),
        status=status,
        max_abs=largest,
        mean_abs=float(sum(difference.sum() for difference in differences)) / count,
        kl=divergence,
        greedy_agreement=float(torch.cat(same).double().mean()),
        left_perplexity=perplexity(prompt_logprobs(left, prompts)),
        right_perplexity=perplexity(prompt_logprobs(right, prompts)),
        reason=reason,
    )


def verify_folder(
    base: Path, adapter: Path | None, merged: Path, prompts: list[list[int]], tolerance: float
) -> tuple[list[Comparison], Logits]:
    """The model state in PEFT and in the engine against the merged float32 folder in transformers, and its logits.

    Compared in float64, where a difference is the weights' own: float32 rounds differently in each program, which
    at logits of 20 alone can pass 1e-4. How far they part in float32 is measured in a row of its own.
    """
    logits = stock_logits(merged, None, prompts, torch.float64)
    rows = []
    try:
        trained = engine_logits(base, adapter, prompts, torch.float64)
    except ModelError as error:  # an architecture that the engine does not train
        rows.append(Comparison("engine / merged", len(prompts), "unverified", reason=str(error)))
    else:
        rows.append(compare("engine / merged", trained, logits, prompts, tolerance))
    if adapter is not None:
        try:
            peft_logits = stock_logits(base, adapter, prompts, torch.float64)
        except MachineError as error:
            rows.append(Comparison("PEFT / merged", len(prompts), "unverified", reason=str(error)))
        else:
            rows.append(compare("PEFT / merged", peft_logits, logits, prompts, tolerance))
    if rows[0].status != "unverified":
        trained = engine_logits(base, adapter, prompts, torch.float32)
        exported = stock_logits(merged, None, prompts, torch.float32)
        rows.append(compare("engine / merged in float32", trained, exported, prompts))
    return rows, logits


def verify_rounded(
    folder: Path, dtype: str, prompts: list[list[int]], exact: Logits, tolerances: Tolerances
) -> Comparison:
    """The written folder in stock transformers against the exact merge's logits: what rounding to `dtype` adds."""
    written = stock_logits(folder, None, prompts, torch.float64)
    limits = {"max_abs": tolerances.merged_logits} if dtype == "float32" else {"kl": tolerances.rounded_kl}
    return compare(f"merged {dtype} / merged", written, exact, prompts, **limits)


def verify_mxfp4(
    folder: Path, prompts: list[list[int]], exact: Logits, share: float, tolerances: Tolerances
) -> Comparison:
    """The MXFP4 folder in stock transformers against the exact merge's logits; `share` is what survived of the change.

    It agrees where both limits hold; else the reason names the ways out.
    """
    row = compare("MXFP4 / merged", stock_logits(folder, None, prompts, torch.float64), exact, prompts)
    agreement = row.greedy_agreement or 0.0
    good = share >= tolerances.mxfp4_share and agreement >= tolerances.mxfp4_agreement
    reason = (
        f"{share:.0%} of the adapter's change survived MXFP4 (at least {tolerances.mxfp4_share:.0%}) and "
        f"{agreement:.1%} of greedy choices agree (at least {tolerances.mxfp4_agreement:.0%}): export hf in bfloat16, "
        f"or base + adapter (formats adapter, ollama)"
    )
    return replace(row, status="agrees" if good else "differs", reason=None if good else reason)


@torch.no_grad()
def greedy_continuations(
    folder: Path, prompts: list[list[int]], new_tokens: int, stop_tokens: frozenset[int]
) -> list[tuple[list[int], torch.Tensor]]:
    """Each prompt's greedy tokens in stock transformers, up to a stop token, with the logits they were chosen from."""
    model = _stock_model(folder)
    widen(model, torch.float32)
    found = []
    for prompt in prompts:
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        output = model(input_ids=torch.tensor([prompt]), use_cache=True)
        while True:
            rows.append(output.logits[0, -1].clone())
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) == new_tokens or tokens[-1] in stop_tokens:
                break
            output = model(
                input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True
            )
        found.append((tokens, torch.stack(rows)))
    return found


def verify_gguf(
    gguf: Path,
    gguf_type: GgufType,
    folder: Path,
    prompts: list[list[int]],
    new_tokens: int,
    stop_tokens: frozenset[int],
    texts: dict[str, list[int]],
    threads: int,
    tolerances: Tolerances,
    exact: Logits,
) -> Comparison:
    """Greedy tokens and perplexity of the GGUF file in llama.cpp against its Hugging Face folder in transformers.

    `texts` maps texts to the ids they must be tokenised to; `exact` are the folder's logits. Unverified where llama.cpp
    is not installed.
    """
    near_tie = tolerances.gguf_near_tie.get(gguf_type)
    pair = f"GGUF {gguf_type} in llama.cpp / merged"
    try:
        answer = ask_llama(gguf, prompts, new_tokens, list(texts), threads, positions=POSITIONS)
    except MachineError as error:
        return Comparison(pair, len(prompts), "unverified", reason=str(error))
    same, gap = 0, 0.0
    for (tokens, logits_TV), found in zip(
        greedy_continuations(folder, prompts, new_tokens, stop_tokens), answer.greedy, strict=True
    ):
        parting = first_difference(tokens, found)
        same += parting is None
        if parting is not None:
            gap = max(gap, float(logits_TV[parting].max() - logits_TV[parting, found[parting]]))
    misread = sum(ids != wanted for ids, wanted in zip(answer.tokens, texts.values(), strict=True))
    reasons = []
    if same < len(prompts):
        reasons.append(
            f"{len(prompts) - same} of {len(prompts)} continuations part from transformers'; there the token's logit "
            f"is at most {gap:.3g} below the best"
            + (f" (near ties of {near_tie} are allowed)" if near_tie is not None else "")
        )
    if misread:
        reasons.append(f"{misread} of {len(texts)} texts are tokenised differently")
    if not yarn_is_rounded(folder):
        reasons.append("the model's YaRN does not round its correction range and llama.cpp's does")
    if misread or gap > (math.inf if near_tie is None else near_tie):
        status: Literal["agrees", "differs", "measured"] = "differs"
    else:
        status = "measured" if near_tie is None else "agrees"
    return Comparison(
        pair,
        len(prompts),
        status,
        greedy_agreement=same / len(prompts),
        left_perplexity=perplexity([torch.tensor(row) for row in answer.logprobs]),
        right_perplexity=perplexity(prompt_logprobs(exact, prompts)),
        reason="; ".join(reasons) or None,
    )


def first_difference(tokens: list[int], found: list[int]) -> int | None:
    """Index of the first token of `tokens` that `found` has differently; what `found` says after its end is ignored."""
    return next((index for index, token in enumerate(tokens) if found[index] != token), None)
