"""Which models Tunix trains, and what it calls the numbers of their configuration. No torch here."""

from collections.abc import Callable, Mapping
from typing import Any

from posttrain.errors import ModelError

Fields = dict[str, Any]
Config = Any
"""A transformers configuration."""

GEMMA3_PATTERN = 6
"""Every so-manieth layer sees all; Tunix has no other pattern."""


def as_tunix(config: Config) -> tuple[str, Fields]:
    """The family, and the fields of its configuration in Tunix. ModelError, with all reasons, for what it would compute
    otherwise than transformers."""
    name = config.model_type
    if name not in FAMILIES:
        raise ModelError(f"Tunix has no {name}; it has {', '.join(FAMILIES)}. Use --backend torch")
    wanted, fields = FAMILIES[name](config)
    wrong = [f"{what} is {value!r}, not {right!r}" for what, (value, right) in wanted.items() if value != right]
    if wrong:
        raise ModelError(
            f"Tunix would not compute this {name} as transformers does: {'; '.join(wrong)}. Use --backend torch"
        )
    shape = {
        "num_layers": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }
    return name, shape | fields


Wanted = Mapping[str, tuple[Any, Any]]
"""By what it is: the configuration's value, and the only one that Tunix computes."""


def _sliding(config: Config) -> list[bool]:
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in types]


def _gemma_wanted(config: Config) -> dict[str, tuple[Any, Any]]:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return {
        "rms_norm_eps": (config.rms_norm_eps, 1e-6),
        "the activation": (activation, "gelu_pytorch_tanh"),
        "attention_bias": (bool(config.attention_bias), False),
        "tie_word_embeddings": (bool(config.tie_word_embeddings), True),
    }


def _one_rope(config: Config) -> dict[str, tuple[Any, Any]]:
    return {"rope_type": (config.rope_parameters["rope_type"], "default")}


def _gemma(config: Config) -> tuple[Wanted, Fields]:
    later = config.model_type == "gemma2"
    scalar = getattr(config, "query_pre_attn_scalar", config.head_dim)
    wanted = (
        _gemma_wanted(config)
        | _one_rope(config)
        | {
            "rope_theta": (config.rope_parameters["rope_theta"], 10_000.0),
            "query_pre_attn_scalar": (scalar, config.head_dim),
        }
    )
    fields = {
        "num_embed": config.vocab_size,
        "final_logit_softcap": getattr(config, "final_logit_softcapping", None),
        "attn_logits_soft_cap": getattr(config, "attn_logit_softcapping", None),
        "use_post_attn_norm": later,
        "use_post_ffw_norm": later,
        "sliding_layers": _sliding(config),
        "sliding_window_size": getattr(config, "sliding_window", None),
    }
    return wanted, fields


def _gemma3(config: Config) -> tuple[Wanted, Fields]:
    local, whole = (config.rope_parameters[kind] for kind in ("sliding_attention", "full_attention"))
    sliding = [(place + 1) % GEMMA3_PATTERN != 0 for place in range(config.num_hidden_layers)]
    by_head = config.query_pre_attn_scalar == config.head_dim
    of_width = config.hidden_size // config.num_attention_heads
    wanted = _gemma_wanted(config) | {
        "layer_types": (_sliding(config), sliding),
        "the local rope_type": (local["rope_type"], "default"),
        "the global rope_type": (whole["rope_type"] in ("default", "linear"), True),
        "query_pre_attn_scalar": (by_head or config.query_pre_attn_scalar == of_width, True),
        "final_logit_softcapping": (config.final_logit_softcapping, None),
        "attn_logit_softcapping": (config.attn_logit_softcapping, None),
    }
    fields = {
        "num_embed": config.vocab_size,
        "sliding_window_size": config.sliding_window,
        "local_base_frequency": local["rope_theta"],
        "global_base_frequency": whole["rope_theta"],
        "global_scale_factor": whole.get("factor", 1.0),
        "scaled_by_head": by_head,
    }
    return wanted, fields


def _plain(tied: str) -> Callable[[Config], tuple[Wanted, Fields]]:
    """Llama and Qwen; `tied` is what their shared embedding is called."""

    def made(config: Config) -> tuple[Wanted, Fields]:
        wanted = _one_rope(config) | {
            "hidden_act": (config.hidden_act, "silu"),
            "attention_bias": (bool(getattr(config, "attention_bias", False)), False),
            "mlp_bias": (bool(getattr(config, "mlp_bias", False)), False),
            "layer_types": (any(_sliding(config)), False),
        }
        fields = {
            "vocab_size": config.vocab_size,
            "rope_theta": config.rope_parameters["rope_theta"],
            "norm_eps": config.rms_norm_eps,
            tied: bool(config.tie_word_embeddings),
        }
        return wanted, fields

    return made


FAMILIES: dict[str, Callable[[Config], tuple[Wanted, Fields]]] = {
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3_text": _gemma3,
    "llama": _plain("weight_tying"),
    "qwen2": _plain("use_tied_embedding"),
    "qwen3": _plain("use_tied_embedding"),
}
