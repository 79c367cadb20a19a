"""Harmony as a Jinja chat template, for programs that load an exported folder."""

import json

from posttrain.chat.harmony import CALLS_LINE, CHANNELS_LINE
from posttrain.recipe.types import HarmonyFormat

_TYPES = r"""
{%- macro type_of(schema, indent) -%}
{%- set kind = schema.type if schema is mapping else none -%}
{%- if schema is mapping and schema.oneOf is defined -%}
{%- for variant in schema.oneOf -%}
{{- '\n' + indent + ' | ' + nullable(variant, indent + '   ') + note([variant.description], variant) -}}
{%- endfor -%}
{%- elif kind is string -%}
{%- if kind == 'object' -%}{{- object(schema, indent) -}}
{%- elif kind == 'string' and schema.enum -%}
{%- for choice in schema.enum -%}
{{- ('' if loop.first else ' | ') + '"' + choice + '"' -}}
{%- endfor -%}
{%- elif kind == 'array' and schema['items'] is mapping -%}{{- type_of(schema['items'], indent) + '[]' -}}
{%- elif kind == 'array' -%}{{- 'Array<any>' -}}
{%- elif kind == 'integer' -%}{{- 'number' -}}
{%- elif kind in ['string', 'number', 'boolean'] -%}{{- kind -}}
{%- else -%}{{- 'any' -}}
{%- endif -%}
{%- elif kind -%}
{%- for name in kind -%}
{{- ('' if loop.first else ' | ') + ('number' if name == 'integer' else name) -}}
{%- endfor -%}
{%- else -%}{{- 'any' -}}
{%- endif -%}
{%- endmacro -%}

{%- macro nullable(schema, indent) -%}
{%- set written = type_of(schema, indent) -%}
{{- written -}}
{%- if schema.nullable and 'null' not in written -%}{{- ' | null' -}}{%- endif -%}
{%- endmacro -%}

{%- macro default(schema) -%}
{%- if schema.default is string and not schema.enum -%}{{- 'default: "' + schema.default + '"' -}}
{%- elif schema.default is string -%}{{- 'default: ' + schema.default -}}
{%- else -%}{{- 'default: ' + (schema.default | tojson(separators=(',', ':'))) -}}
{%- endif -%}
{%- endmacro -%}

{%- macro note(texts, schema) -%}
{%- set found = namespace(text='') -%}
{%- for text in texts if text -%}{%- set found.text = ' ' + text -%}{%- endfor -%}
{%- if schema.default is defined -%}{%- set found.text = found.text + ' ' + default(schema) -%}{%- endif -%}
{%- if found.text -%}{{- ' //' + found.text -}}{%- endif -%}
{%- endmacro -%}

{%- macro object(schema, indent) -%}
{%- if schema.description is string -%}{{- indent + '// ' + schema.description + '\n' -}}{%- endif -%}
{{- '{\n' -}}
{%- for name, value in (schema.properties or {}).items() -%}
{{- property(indent + name + ('' if name in (schema.required or []) else '?'), value, indent) -}}
{%- endfor -%}
{{- indent + '}' -}}
{%- endmacro -%}

{%- macro property(label, schema, indent) -%}
{%- if schema.title is string -%}{{- indent + '// ' + schema.title + '\n' + indent + '//\n' -}}{%- endif -%}
{%- if schema.description is string and schema.oneOf is not defined -%}
{{- indent + '// ' + schema.description + '\n' -}}
{%- endif -%}
{%- if schema.examples -%}
{{- indent + '// Examples:\n' -}}
{%- for example in schema.examples if example is string -%}{{- indent + '// - "' + example + '"\n' -}}{%- endfor -%}
{%- endif -%}
{%- if schema.oneOf is defined -%}{{- choice(label, schema, indent) -}}
{%- else -%}{{- label + ': ' + nullable(schema, indent + '    ') + ',' + note([], schema) + '\n' -}}
{%- endif -%}
{%- endmacro -%}

{%- macro choice(label, schema, indent) -%}
{%- set above = schema.description is string and schema.description != schema.oneOf[0].description -%}
{%- if above -%}{{- indent + '// ' + schema.description + '\n' -}}{%- endif -%}
{%- if schema.default is defined -%}{{- indent + '// ' + default(schema) + '\n' -}}{%- endif -%}
{{- label + ':\n' -}}
{%- for variant in schema.oneOf -%}
{%- set silent = (above and loop.first) or variant.description == schema.description -%}
{{- indent + ' | ' + nullable(variant, indent + '   ') -}}
{{- note([] if silent else [variant.description], variant) + '\n' -}}
{%- endfor -%}
{{- indent + ',\n' -}}
{%- endmacro -%}
"""

_HEADER = r"""
{%- set identity = model_identity if model_identity is defined and model_identity else @IDENTITY@ -%}
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else @EFFORT@ -%}
{{- '<|start|>system<|message|>' + identity + '\n' + @DATES@ + '\n\nReasoning: ' + effort + '\n\n' + @CHANNELS@ -}}
{%- if tools -%}{{- '\n' + @CALLS@ -}}{%- endif -%}
{{- '<|end|>' -}}

{%- set told = namespace(instructions=none, rest=messages) -%}
{%- if messages and messages[0].role in ['system', 'developer'] -%}
{%- set told.instructions = messages[0].content -%}
{%- set told.rest = messages[1:] -%}
{%- endif -%}
{%- if told.instructions is not none or tools -%}
{{- '<|start|>developer<|message|>' -}}
{%- if told.instructions is not none -%}
{{- '# Instructions\n\n' + told.instructions + ('\n\n' if tools else '') -}}
{%- endif -%}
{%- if tools -%}
{{- '# Tools\n\n## functions\n\nnamespace functions {\n\n' -}}
{%- for tool in tools -%}
{%- set offered = tool.function if tool.function is defined else tool -%}
{%- set lines = (offered.description or '').split('\n') -%}
{%- for line in lines -%}
{%- if not (loop.last and line == '') -%}{{- '// ' + line + '\n' -}}{%- endif -%}
{%- endfor -%}
{{- 'type ' + offered.name + ' = (_: ' + type_of(offered.parameters, '') + ') => any;\n\n' -}}
{%- endfor -%}
{{- '} // namespace functions' -}}
{%- endif -%}
{{- '<|end|>' -}}
{%- endif -%}
"""

_MESSAGES = r"""
{%- set turn = namespace(start=0, tool=none) -%}
{%- for message in told.rest if message.role == 'user' -%}{%- set turn.start = turn.start + 1 -%}{%- endfor -%}
{%- set seen = namespace(users=0) -%}
{%- for message in told.rest -%}
{%- set current = seen.users == turn.start -%}
{%- if message.role == 'user' -%}
{%- set seen.users = seen.users + 1 -%}
{{- '<|start|>user<|message|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'tool' -%}
{%- set sender = message.name if message.name is defined and message.name else turn.tool -%}
{%- if not sender -%}{{- raise_exception('A tool message needs a name or a call in front of it.') -}}{%- endif -%}
{{- '<|start|>functions.' + sender + ' to=assistant<|channel|>commentary<|message|>' -}}
{{- (message.content if message.content is string else message.content | tojson) + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{%- if message.tool_calls is defined and message.tool_calls -%}
{%- if message.content and message.thinking -%}
{{- raise_exception('A message with tool calls holds its analysis in content or in thinking, not in both.') -}}
{%- endif -%}
{%- set thought = message.thinking or message.content -%}
{%- else -%}
{%- set thought = message.thinking -%}
{%- endif -%}
{%- if thought and current -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' -}}
{%- endif -%}
{%- for made in message.tool_calls or [] -%}
{%- set called = made.function if made.function is defined else made -%}
{%- set turn.tool = called.name -%}
{{- '<|start|>assistant to=functions.' + called.name + '<|channel|>commentary <|constrain|>json<|message|>' -}}
{{- called.arguments if called.arguments is string else called.arguments | tojson(separators=(',', ':')) -}}
{{- '<|call|>' -}}
{%- endfor -%}
{%- if not message.tool_calls -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- endif -%}
{%- else -%}
{{- raise_exception('Unknown role ' + message.role + ': instructions go into the first message.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


def harmony_template(chat: HarmonyFormat) -> str:
    """The text of `chat_template.jinja`, called as `apply_chat_template` calls it.

    Messages have `role` and `content`; the assistant's may have `thinking` and `tool_calls`. A first system or
    developer message is the developer's instructions. Identity, dates and effort are those of `chat`; the caller may
    give another `model_identity` or `reasoning_effort`. Special tokens in a message's text are not kept apart: a
    template yields one string, so text from strangers is safer rendered by `Harmony`.
    """
    constants = {
        "@IDENTITY@": chat.identity,
        "@EFFORT@": chat.reasoning_effort,
        "@DATES@": f"Knowledge cutoff: {chat.knowledge_cutoff}\nCurrent date: {chat.date}",
        "@CHANNELS@": CHANNELS_LINE,
        "@CALLS@": CALLS_LINE,
    }
    template = _TYPES + _HEADER + _MESSAGES
    for name, value in constants.items():
        template = template.replace(name, json.dumps(value, ensure_ascii=False))
    return template.strip() + "\n"
