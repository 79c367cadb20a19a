"""Toy GPT-OSS folders with a vocabulary of their own, and stock PEFT adapters on them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
VOCABULARY = 384


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE with the o200k split, trained on a few sentences, fewer tokens than embeddings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Read the file src/app.py, then run the tests.", 'call {"city":"Berlin","days":12345}', "the then there's"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text * 4, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def toy_base(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A random GPT-OSS whose sinks, biases and router matter, with YaRN as llama.cpp computes it."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "sliding_window": 8,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|return|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "original_max_position_embeddings": 64,
        },
        **changes,
    }
    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name or "sinks" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.12 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    return folder


def toy_adapter(base: Path, folder: Path, seed: int = 1, **settings: object) -> Path:
    """A random stock PEFT adapter on attention and both expert projections."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 12,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return folder


def dense_base(folder: Path, model_type: str, seed: int = 0, **changes: object) -> Path:
    """A random Llama, Qwen, Qwen3-MoE or Gemma with the toy's vocabulary, a tied head where the family has one."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    settings: dict[str, object] = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|return|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **FAMILIES[model_type],
        **changes,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(*((-0.3, 0.3) if model_type.startswith("gemma") else (0.5, 1.5)))
            elif "bias" in name:
                parameter.normal_(0, 0.5)
            else:
                # Large enough that the layers, not the tied embedding alone, decide the next token.
                embedding = 0.1 if model_type.startswith("gemma") else 0.5
                parameter.normal_(0, embedding if "embed" in name else 0.3)
    model.save_pretrained(folder)
    return folder


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16},
}


def any_adapter(base: Path, folder: Path, **settings: object) -> Path:
    """A stock PEFT adapter on attention, the dense feed-forward and the experts, whichever there are."""
    experts = AutoConfig.from_pretrained(base).model_type in ("gpt_oss", "qwen3_moe")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets: dict[str, object] = {
        "target_modules": attention if experts else [*attention, "gate_proj", "up_proj", "down_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None,
    }
    return toy_adapter(base, folder, **(targets | settings))
