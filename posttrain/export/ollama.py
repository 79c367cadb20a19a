"""Modelfiles: the merged GGUF file, and a base with the adapter on it, with stop tokens, parameters and template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.export.gguf_vocabulary import read_tokens
from posttrain.export.weights import read_config
from posttrain.run.folder import write_atomic

HARMONY_STOPS = ("<|return|>", "<|call|>")
"""What ends a turn; `<|end|>` only separates the messages of one."""
PUBLISHED = {"gpt_oss": {32: "gpt-oss:20b", 128: "gpt-oss:120b"}}
"""Ollama's own names of bases, by model type and number of experts."""


@dataclass(frozen=True)
class HarmonySettings:
    date: str
    knowledge_cutoff: str
    reasoning_effort: str
    identity: str


def write_modelfiles(
    folder: Path, base: Path, merged: str, adapter: str | None, harmony: HarmonySettings | None
) -> None:
    """`Modelfile` for the merged file and, with an adapter, `Modelfile.adapter` for the base it was made on."""
    lines = settings_lines(base, harmony)
    write_atomic(folder / "Modelfile", _text([f"FROM {merged}", *lines]))
    if adapter is not None:
        write_atomic(folder / "Modelfile.adapter", _text([f"FROM {base_name(base)}", f"ADAPTER ./{adapter}", *lines]))


def _text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def base_name(base: Path) -> str:
    """Ollama's name of the base, or a file to be put there."""
    config = read_config(base)
    dimensions = (config.get("hidden_size"), config.get("vocab_size"))
    if config.get("model_type") == "gpt_oss" and dimensions == (2880, 201088):
        known = PUBLISHED["gpt_oss"].get(config.get("num_local_experts", 0))
        if known:
            return known
    return "./base.gguf"


def settings_lines(base: Path, harmony: HarmonySettings | None) -> list[str]:
    """TEMPLATE and PARAMETER lines. Other families' templates stand in the GGUF file, where Ollama finds them."""
    config = read_config(base)
    file = base / "generation_config.json"
    generation: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    lines = []
    if config.get("model_type") == "gpt_oss":
        lines.append(f'TEMPLATE """{harmony_template(harmony)}"""')
        stops: tuple[str, ...] = HARMONY_STOPS
    else:
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        tokens = read_tokens(base)
        stops = tuple(tokens[end] for end in (ends if isinstance(ends, list) else [ends]) if end in tokens)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    for name in ("temperature", "top_p", "top_k"):
        if generation.get(name) is not None:
            lines.append(f"PARAMETER {name} {generation[name]}")
    lines.append(f"PARAMETER num_ctx {min(int(config.get('max_position_embeddings', 4096)), 131072)}")
    return lines


def harmony_template(harmony: HarmonySettings | None) -> str:
    """Harmony in Ollama's template language: system, tools in the developer message, turns, tool calls and results."""
    system = harmony.identity if harmony else "You are ChatGPT, a large language model trained by OpenAI."
    if harmony:
        system += f"\nKnowledge cutoff: {harmony.knowledge_cutoff}\nCurrent date: {harmony.date}\n"
        system += f"\nReasoning: {harmony.reasoning_effort}\n"
    else:
        system += "\nKnowledge cutoff: 2024-06\n\nReasoning: medium\n"
    system += "\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
    tools = "\nCalls to these tools must go to the commentary channel: 'functions'."
    return (
        f"<|start|>system<|message|>{system}{{{{ if .Tools }}}}{tools}{{{{ end }}}}<|end|>"
        "{{ if or .System .Tools }}<|start|>developer<|message|>"
        "{{ if .System }}# Instructions\n\n{{ .System }}{{ if .Tools }}\n\n{{ end }}{{ end }}"
        "{{ if .Tools }}# Tools\n\n## functions\n\nnamespace functions {\n"
        "{{ range .Tools }}\n// {{ .Function.Description }}\ntype {{ .Function.Name }} = (_: {\n"
        "{{ range $name, $property := .Function.Parameters.Properties }}"
        "{{ if $property.Description }}// {{ $property.Description }}\n{{ end }}"
        "{{ $name }}: {{ $property.ToTypeScriptType }},\n{{ end }}"
        "}) => any;\n{{ end }}\n} // namespace functions{{ end }}<|end|>{{ end }}"
        "{{ range .Messages }}"
        '{{ if eq .Role "user" }}<|start|>user<|message|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}'
        "{{ range .ToolCalls }}<|start|>assistant<|channel|>commentary to=functions.{{ .Function.Name }} "
        "<|constrain|>json<|message|>{{ .Function.Arguments }}<|call|>{{ end }}"
        "{{ if .Content }}<|start|>assistant<|channel|>final<|message|>{{ .Content }}<|end|>{{ end }}"
        '{{ else if eq .Role "tool" }}<|start|>functions.{{ .ToolName }} to=assistant<|channel|>commentary'
        "<|message|>{{ .Content }}<|end|>{{ end }}"
        "{{ end }}<|start|>assistant"
    )
