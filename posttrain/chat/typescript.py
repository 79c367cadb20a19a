"""JSON schemas as the TypeScript-like types in which Harmony declares tools.

Every rule is one of the official library, quirks included, because the models were trained on its output.
A missing or unknown `type` is `any`; `anyOf`, `$ref` and formats are not spelled out.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from posttrain.chat.conversation import Tool

SCALARS = {"number": "number", "integer": "number", "boolean": "boolean"}


def namespace(name: str, tools: Sequence[Tool], description: str | None = None) -> str:
    """The `## name` section that declares `tools`; without tools it is the description alone."""
    comment = "// " if tools else ""
    lines = [f"## {name}\n", *(f"{comment}{line}" for line in _lines(description or ""))]
    if not tools:
        return "\n".join(lines)
    lines.append(f"namespace {name} {{\n")
    for tool in tools:
        lines += [f"// {line}" for line in _lines(tool.description)]
        taken = "" if tool.parameters is None else f"_: {type_of(tool.parameters, '')}"
        lines.append(f"type {tool.name} = ({taken}) => any;\n")
    return "\n".join([*lines, f"}} // namespace {name}"])


def type_of(schema: Any, indent: str) -> str:
    """The type that `schema` describes; `indent` stands in front of its inner lines."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_variant(variant, indent)}" for variant in schema["oneOf"])
    kind = schema.get("type")
    if isinstance(kind, list):
        names = [SCALARS["integer"] if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    match kind:
        case "object":
            return _object(schema, indent)
        case "string":
            choices = [f'"{choice}"' for choice in _list(schema, "enum") if isinstance(choice, str)]
            return " | ".join(choices) or "string"
        case "array":
            return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
        case str():
            return SCALARS.get(kind, "any")
    return "any"


def _object(schema: dict[str, Any], indent: str) -> str:
    description = _string(schema, "description")
    lines = [] if description is None else [f"{indent}// {description}\n"]
    lines.append("{\n")
    properties = schema.get("properties")
    if isinstance(properties, dict):
        required = [name for name in _list(schema, "required") if isinstance(name, str)]
        for name, value in properties.items():
            label = f"{indent}{name}{'' if name in required else '?'}"
            lines.append(_property(label, value if isinstance(value, dict) else {}, indent))
    lines.append(f"{indent}}}")
    return "".join(lines)


def _property(label: str, schema: dict[str, Any], indent: str) -> str:
    lines = []
    if (title := _string(schema, "title")) is not None:
        lines.append(f"{indent}// {title}\n{indent}//\n")
    description = _string(schema, "description")
    if description is not None and "oneOf" not in schema:
        lines.append(f"{indent}// {description}\n")
    if examples := _list(schema, "examples"):
        lines.append(f"{indent}// Examples:\n")
        lines += [f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str)]
    if isinstance(schema.get("oneOf"), list):
        return "".join(lines) + _choice(label, schema, indent)
    default = "" if "oneOf" in schema or "default" not in schema else f" // {_default(schema)}"
    return "".join(lines) + f"{label}: {_nullable(schema, indent + '    ')},{default}\n"


def _choice(label: str, schema: dict[str, Any], indent: str) -> str:
    """A property with `oneOf`: its description stands above, unless the first variant says the same."""
    variants = schema["oneOf"]
    description = _string(schema, "description")
    first = _string(variants[0], "description") if variants else None
    above = description is not None and description != first
    lines = [f"{indent}// {description}\n"] if above else []
    if "default" in schema:
        lines.append(f"{indent}// {_default(schema)}\n")
    lines.append(f"{label}:\n")
    for place, variant in enumerate(variants):
        text = _string(variant, "description")
        comments = [text] if text is not None and text != description and not (place == 0 and above) else []
        if isinstance(variant, dict) and "default" in variant:
            comments.append(_default(variant))
        lines.append(f"{indent} | {_nullable(variant, indent + '   ')}{_trailing(comments)}\n")
    return "".join([*lines, f"{indent},\n"])


def _variant(schema: Any, indent: str) -> str:
    """One choice of a `oneOf` that is not a property's; here a string default is always quoted."""
    comments = [text for text in (_string(schema, "description"),) if text is not None]
    if isinstance(schema, dict) and "default" in schema:
        comments.append(f"default: {_quoted(schema['default'], escaped=bool(_list(schema, 'enum')))}")
    return _nullable(schema, indent + "   ") + _trailing(comments)


def _nullable(schema: Any, indent: str) -> str:
    text = type_of(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _default(schema: dict[str, Any]) -> str:
    """A property's default; unquoted where the string is one of an enumeration."""
    value = schema["default"]
    if isinstance(value, str) and _list(schema, "enum"):
        return f"default: {value}"
    return f"default: {_quoted(value, escaped=False)}"


def _quoted(value: Any, escaped: bool) -> str:
    return f'"{value}"' if isinstance(value, str) and not escaped else _json(value)


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def _string(schema: Any, key: str) -> str | None:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, str) else None


def _list(schema: Any, key: str) -> list[Any]:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, list) else []


def _lines(text: str) -> list[str]:
    """Lines ended by a line feed only, as Rust counts them."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _json(value: Any) -> str:
    """Compact JSON with numbers written as serde_json does."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(str(key))}:{_json(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_json(inner) for inner in value) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        value = float(value)
    return _float(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """The shortest digits that read back equal; an exponent only below 1e-5 and from 1e16 on, without padding."""
    if not math.isfinite(value):
        return "null"
    text = repr(value)
    if "e" not in text:
        return text
    digits, exponent = text.split("e")
    power = int(exponent)
    if power == -5:
        sign = "-" if digits.startswith("-") else ""
        return f"{sign}0.0000{digits.removeprefix('-').replace('.', '')}"
    return f"{digits}e{power}"
