"""What `/v1` is asked, as OpenAI's clients and vLLM's send it.

A field that is not known here is refused; so is one whose value would change an answer in a way that is not built.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.chat.conversation import Conversation, Effort
from posttrain.data.formats.messages import written
from posttrain.data.formats.turns import offered
from posttrain.errors import InputError
from posttrain.serve.asking import Ask

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
Zero = Annotated[float, Field(ge=0, le=0)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LOGPROBS = 20
"""Alternatives of a token, at most."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampled(Strict):
    """What both kinds of completion have in common."""

    model: Annotated[str, Field(max_length=200)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """-1 and 0 take all."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    """Only `stop_token_ids` end the answer."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def count(self) -> int:
        return self.n or 1

    def asked(self, max_new_tokens: int | None, likeliest: int, each_token: bool, call: str | None = None) -> Ask:
        return Ask(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k if (self.top_k or 0) > 0 else None,
            max_new_tokens=max_new_tokens,
            # A generator's seed is not negative.
            seed=None if self.seed is None else self.seed % 2**64,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_tokens=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            likeliest=likeliest,
            each_token=each_token,
            call=call,
        )


class CompletionRequest(Sampled):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=256)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    skip_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _built(self) -> "CompletionRequest":
        if self.best_of not in (None, self.count):
            raise ValueError(f"best_of is {self.best_of}: answers are not ranked, so it can only be n, {self.count}")
        if self.echo and self.stream:
            raise ValueError("echo goes without stream")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # token numbers, by its first
        return list(self.prompt)  # type: ignore[arg-type]  # several, by its first

    def ask(self) -> Ask:
        tokens = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.asked(tokens, self.logprobs or 0, bool(self.stream))


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None
    """Nothing forces arguments to follow their schema."""

    @field_validator("parameters")
    @classmethod
    def _schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        properties = (schema or {}).get("properties", {})
        if (schema or {}).get("type", "object") != "object":
            raise ValueError("the schema of parameters is of type object")
        if not isinstance(properties, dict) or not all(isinstance(one, dict) for one in properties.values()):
            raise ValueError("properties is an object of schemas")
        return schema


class ToolOffered(Strict):
    type: Literal["function"]
    function: Function


class Named(Strict):
    name: str


class ToolChosen(Strict):
    type: Literal["function"]
    function: Named


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[ToolOffered] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChosen | None = None
    parallel_tool_calls: Literal[True] | None = None
    """Whether there are several is up to the chat format."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS)] | None = None
    reasoning_effort: Effort | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens is 0: an answer has a token at least")
        return self

    def conversation(self) -> Conversation:
        """Raises BadRow."""
        tools = [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        conversation = written(self.messages, "messages").prompt(offered(tools, "tools"))
        return conversation.model_copy(update={"reasoning_effort": self.reasoning_effort})

    def call(self) -> str | None:
        """The function that must be called. Raises InputError for one that is not offered."""
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice == "required":
            if len(names) != 1:
                raise InputError(
                    f"tool_choice is required and {len(names)} tools are offered: name the one that must be called, "
                    f'as {{"type": "function", "function": {{"name": ...}}}}'
                )
            return names[0]
        if isinstance(self.tool_choice, ToolChosen):
            if self.tool_choice.function.name not in names:
                raise InputError(f"tool_choice names {self.tool_choice.function.name!r}; offered are {names}")
            return self.tool_choice.function.name
        return None

    def ask(self) -> Ask:
        tokens = self.max_completion_tokens or self.max_tokens
        each_token = bool(self.stream or self.logprobs)
        return self.asked(tokens, self.top_logprobs or 0, each_token, self.call())


class LoadAdapter(Strict):
    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    """Replace the adapter of this name."""


class UnloadAdapter(Strict):
    lora_name: Annotated[str, Field(max_length=200)]
