"""A Hugging Face chat template as a program that writes text, with what transformers gives it but for today's date."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from posttrain.errors import ChatFormatError, ModelError


class JinjaProgram:
    """`variables` are what every call gets; the clock stands still at `today`."""

    def __init__(self, source: str, variables: Mapping[str, Any], today: date) -> None:
        self.source = source
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = today.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from None

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        prompting: bool,
        further: Mapping[str, Any],
    ) -> str:
        """`prompting` asks for the beginning of the assistant's next message. Raises ChatFormatError."""
        given = self._variables | dict(further)
        try:
            return self._template.render(
                messages=list(messages), tools=tools, documents=None, add_generation_prompt=prompting, **given
            )
        except Exception as error:
            # A template is a foreign program: whatever stops it is its answer to these messages.
            raise ChatFormatError(f"the chat template refuses this conversation: {error}") from None


class Generation(Extension):
    """The block in which some templates wrap what the model writes; here it only writes it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it on the instance)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        return str(caller())


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
