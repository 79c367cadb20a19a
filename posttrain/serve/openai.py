"""OpenAI's endpoints over the in-process sampler, with what vLLM adds to them: token ids, top-k, adapters.

Log-probabilities are those of the sampling temperature, and at 1 where that is 0 and in the prompt.
"""

import asyncio
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from posttrain.chat.conversation import Message
from posttrain.data.formats.format import BadRow
from posttrain.errors import ChatFormatError, InputError, MachineError, PosttrainError, Stopped
from posttrain.serve.asking import Busy, TooLong, UnknownModel, generation_of
from posttrain.serve.openai_requests import ChatRequest, CompletionRequest, LoadAdapter, Sampled, UnloadAdapter
from posttrain.serve.problems import OPENAI, openai_error
from posttrain.serve.settings import Serving

if TYPE_CHECKING:
    from posttrain.rollout.live import Token
    from posttrain.serve.answers import Answer, Model, Written

CLIENT_GONE = 499
Json = dict[str, Any]


class Route(APIRoute):
    """Errors in OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:  # answered in OpenAI's shape; `refusal` logs what is a fault of ours
                status, body = refusal(error)
                return JSONResponse(body, status)

        return answered


router = APIRouter(prefix=OPENAI, tags=["openai"], route_class=Route)
KINDS: tuple[tuple[type[Exception], int, str | None, str | None], ...] = (
    (UnknownModel, 404, "model", "model_not_found"),
    (TooLong, 400, None, "context_length_exceeded"),
    (Busy, 429, None, None),
    (InputError, 400, None, None),
    (ChatFormatError, 400, "messages", None),
    (MachineError, 503, None, None),
    (Stopped, 503, None, None),
)
"""Error → status, parameter, code; the first that fits counts."""


def refusal(error: Exception) -> tuple[int, Json]:
    """Status and body."""
    status, param, code, message = 500, None, None, str(error)
    if isinstance(error, RequestValidationError):
        status, fault = 400, error.errors()[0]
        place = [str(part) for part in fault["loc"][1:]]
        param = ".".join(place) or None
        message = f"{param or 'body'}: {fault['msg']}"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, BadRow):
        status, param = 400, error.field
    elif found := next((row for row in KINDS if isinstance(error, row[0])), None):
        _, status, param, code = found
    elif not isinstance(error, PosttrainError):
        logging.getLogger(__name__).error(OPENAI, exc_info=error)
        message = f"unforeseen error, a fault of ours: {type(error).__name__}: {error}"
    return status, openai_error(status, message, param, code)


# ---------------------------------------------------------------- models and adapters


@router.get("/models")
def list_models(request: Request) -> Json:
    return {"object": "list", "data": [_described(name) for name in generation_of(request.app).models()]}


@router.get("/models/{name:path}")
def get_model(request: Request, name: str) -> Json:
    if name not in generation_of(request.app).models():
        raise UnknownModel(f"the model {name!r} does not exist; GET /v1/models lists those that do")
    return _described(name)


def _described(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "posttrain"}


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
def load_adapter(request: Request, settings: Serving, asked: LoadAdapter) -> str:
    folder = _contained(Path(asked.lora_path), settings.runs_dir)
    generation_of(request.app).load_adapter(asked.lora_name, folder, asked.load_inplace)
    return f"Success: LoRA adapter '{asked.lora_name}' added successfully."


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
def unload_adapter(request: Request, asked: UnloadAdapter) -> str:
    generation_of(request.app).unload_adapter(asked.lora_name)
    return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."


def _contained(folder: Path, root: Path) -> Path:
    """The adapter's folder, links followed; what lies elsewhere is refused before it is looked at."""
    try:
        real = folder.resolve()
    except (OSError, ValueError, RuntimeError):
        real = Path("/")
    if not folder.is_absolute() or not real.is_relative_to(root.resolve()):
        raise InputError(f"lora_path {str(folder)!r} does not lie in the runs folder {root}")
    if not (real / "adapter_config.json").is_file():
        raise HTTPException(404, f"no adapter found for {str(folder)!r}: it has no adapter_config.json")
    return real


# ---------------------------------------------------------------- answers


@router.post("/completions")
async def complete(request: Request, asked: CompletionRequest) -> Response:
    model = await run_in_threadpool(generation_of(request.app).model, asked.model)
    prompts = await run_in_threadpool(lambda: [model.tokens(prompt) for prompt in asked.prompts])
    told: list[list[Token]] = []
    if asked.echo and asked.logprobs is not None:
        told = [await run_in_threadpool(model.prompt_tokens, prompt, asked.logprobs) for prompt in prompts]
    answers: list[Answer] = []
    if asked.max_tokens != 0:
        answers = model.complete(prompts, asked.ask(), asked.count, asked.skip_special_tokens is False)
    elif not asked.echo:
        raise InputError("max_tokens is 0, which only makes sense with echo")
    shape = Completions(model, asked, prompts, told)
    return await _response(request, asked, shape, answers, sum(map(len, prompts)))


@router.post("/chat/completions")
async def chat(request: Request, asked: ChatRequest) -> Response:
    conversation, ask = asked.conversation(), asked.ask()
    model = await run_in_threadpool(generation_of(request.app).model, asked.model)
    answers = await run_in_threadpool(model.chat, conversation, ask, asked.count)
    return await _response(request, asked, Chats(model, asked), answers, len(answers[0].prompt))


@dataclass
class Shape(ABC):
    """How answers are told: choices of the whole, and of chunks."""

    model: "Model"
    asked: Any
    name: ClassVar[str]
    chunk_name: ClassVar[str]
    prefix: ClassVar[str]

    @abstractmethod
    def choice(self, index: int, answer: "Answer | None", written: "Written") -> Json:
        """The whole answer; None where there is only an echo."""

    def begun(self, index: int) -> list[Json]:
        """Choices of the first chunks."""
        return []

    @abstractmethod
    def delta(self, index: int, written: "Written") -> list[Json]: ...

    @abstractmethod
    def ended(self, index: int, answer: "Answer") -> list[Json]: ...

    def ids(self, numbers: Sequence[int], prompt: Sequence[int] | None = None) -> Json:
        if not self.asked.return_token_ids:
            return {}
        return {"token_ids": list(numbers)} | ({} if prompt is None else {"prompt_token_ids": list(prompt)})

    def spelled(self, number: int) -> str:
        return self.model.render.text([number])


@dataclass
class Completions(Shape):
    asked: CompletionRequest
    prompts: Sequence[list[int]]
    told: "Sequence[list[Token]]"
    """Where prompts are echoed with log-probabilities: theirs, without the first token's."""
    name = chunk_name = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, answer: "Answer | None", written: "Written") -> Json:
        place = index // self.asked.count
        prompt = self.prompts[place]
        text, logprobs = _text(written), None
        if self.asked.echo:
            given = self.asked.prompts[place]
            text = (given if isinstance(given, str) else self.model.render.text(prompt)) + text
        if self.asked.logprobs is not None:
            first = prompt[:1] if self.asked.echo else []
            logprobs = self._logprobs(first, [*(self.told[place] if self.told else []), *written.tokens])
        reason = "length" if answer is None else answer.ended
        ids = self.ids([] if answer is None else answer.tokens, prompt)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **ids}

    def delta(self, index: int, written: "Written") -> list[Json]:
        text, numbers = _text(written), [token.number for token in written.tokens]
        if not text and self.asked.logprobs is None and not self.asked.return_token_ids:
            return []
        logprobs = None if self.asked.logprobs is None else self._logprobs([], written.tokens)
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, **self.ids(numbers)}]

    def ended(self, index: int, answer: "Answer") -> list[Json]:
        return [{"index": index, "text": "", "logprobs": None, "finish_reason": answer.ended}]

    def _logprobs(self, first: Sequence[int], tokens: "Sequence[Token]") -> Json:
        """`first` is a token that nothing comes before."""
        names = [self.spelled(number) for number in (*first, *(token.number for token in tokens))]
        tops: list[Json | None] = [
            {self.spelled(number): logprob for number, logprob in (*token.likeliest, (token.number, token.logprob))}
            for token in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": [*(None for _ in first), *(token.logprob for token in tokens)],
            "top_logprobs": [*(None for _ in first), *tops],
            "text_offset": list(accumulate(map(len, names[:-1]), initial=0)) if names else [],
        }


@dataclass
class Chats(Shape):
    asked: ChatRequest
    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, answer: "Answer | None", written: "Written") -> Json:
        assert answer is not None
        calls, end = self._end(answer)
        message: Json = {"role": "assistant", "content": _text(written) or (None if calls else ""), "refusal": None}
        if thought := _text(written, analysis=True):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        ids = self.ids(answer.tokens, answer.prompt)
        return {"index": index, "message": message, "logprobs": self._logprobs(written), **end, **ids}

    def begun(self, index: int) -> list[Json]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def delta(self, index: int, written: "Written") -> list[Json]:
        """A choice per piece, the first with what is told of the tokens."""
        logprobs, ids = self._logprobs(written), self.ids([token.number for token in written.tokens])
        keys = ["reasoning_content" if piece.channel == "analysis" else "content" for piece in written.pieces]
        deltas: list[Json] = [{key: piece.text} for key, piece in zip(keys, written.pieces, strict=True)]
        if not deltas and written.tokens and (logprobs or ids):
            deltas = [{}]
        chunks = [self._chunk(index, delta) for delta in deltas]
        if chunks:
            chunks[0] |= {"logprobs": logprobs, **ids}
        return chunks

    def ended(self, index: int, answer: "Answer") -> list[Json]:
        calls, end = self._end(answer)
        told = [self._chunk(index, {"tool_calls": [{"index": n, **call}]}) for n, call in enumerate(calls)]
        return [*told, self._chunk(index, {}) | end]

    def _chunk(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _end(self, answer: "Answer") -> tuple[list[Json], Json]:
        """The calls that it makes, and why it ended; a completion that is no message says so as `fault`."""
        if not answer.whole:
            return [], {"finish_reason": answer.ended}
        try:
            calls = [_call(message) for message in answer.messages() if message.recipient is not None]
        except ChatFormatError as error:
            return [], {"finish_reason": "stop", "fault": str(error)}
        return calls, {"finish_reason": "tool_calls" if calls else "stop"}

    def _logprobs(self, written: "Written") -> Json | None:
        if not self.asked.logprobs:
            return None
        return {
            "content": [
                self._one(token.number, token.logprob) | {"top_logprobs": [self._one(*one) for one in token.likeliest]}
                for token in written.tokens
            ],
            "refusal": None,
        }

    def _one(self, number: int, logprob: float) -> Json:
        name = self.spelled(number)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


def _text(written: "Written", analysis: bool = False) -> str:
    return "".join(piece.text for piece in written.pieces if (piece.channel == "analysis") == analysis)


def _call(message: Message) -> Json:
    name = str(message.recipient).removeprefix("functions.")
    function = {"name": name, "arguments": message.content}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


# ---------------------------------------------------------------- responses


async def _response(
    request: Request, asked: Sampled, shape: Shape, answers: "list[Answer]", prompt_tokens: int
) -> Response:
    head = {"id": f"{shape.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        events = _events({**head, "object": shape.chunk_name}, asked, shape, answers, prompt_tokens)
        return Stream(events, answers)
    told = asyncio.ensure_future(_whole(shape, answers))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            return Response(status_code=CLIENT_GONE)
        usage = _usage(prompt_tokens, answers)
        return JSONResponse({**head, "object": shape.name, "choices": told.result(), "usage": usage})
    finally:
        told.cancel()
        gone.cancel()


class Stream(StreamingResponse):
    """Server-sent events; whoever closes the connection, even before the first, ends the answers."""

    def __init__(self, events: AsyncIterator[str], answers: "list[Answer]") -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self.answers:
                answer.cancel()


async def _gone(request: Request) -> None:
    """Until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(shape: Shape, answers: "list[Answer]") -> list[Json]:
    from posttrain.serve.answers import Written

    if not answers:
        assert isinstance(shape, Completions)
        count = len(shape.prompts) * shape.asked.count
        return [shape.choice(index, None, Written([], [])) for index in range(count)]
    choices = []
    try:
        for index, answer in enumerate(answers):
            pieces, tokens = [], []
            async for written in answer:
                pieces += written.pieces
                tokens += written.tokens
            choices.append(shape.choice(index, answer, Written(pieces, tokens)))
    finally:
        for answer in answers:
            answer.cancel()
    return choices


async def _events(
    head: Json, asked: Sampled, shape: Shape, answers: "list[Answer]", prompt_tokens: int
) -> AsyncIterator[str]:
    """Every chunk as an event, then the end of the stream."""
    told: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_feed(index, answer, told)) for index, answer in enumerate(answers)]
    try:
        for index in range(len(answers)):
            for choice in shape.begun(index):
                yield _event({**head, "choices": [choice]})
        going = len(answers)
        while going:
            index, what = await told.get()
            if isinstance(what, Exception):
                yield _event(refusal(what)[1])
                break
            going -= what is None
            for choice in shape.ended(index, answers[index]) if what is None else shape.delta(index, what):
                yield _event({**head, "choices": [choice]})
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(prompt_tokens, answers)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


async def _feed(index: int, answer: "Answer", told: "asyncio.Queue[tuple[int, Any]]") -> None:
    try:
        async for written in answer:
            told.put_nowait((index, written))
        told.put_nowait((index, None))
    except Exception as error:  # handed to who reads the queue, and raised there
        told.put_nowait((index, error))


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _usage(prompt_tokens: int, answers: "list[Answer]") -> Json:
    written = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
