"""`/v1` through OpenAI's own client: what the sampler writes, streamed and whole, for many clients at once."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.engine import adapters
from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import Item, pack
from posttrain.recipe.types import Lora, Sampling
from posttrain.recipes.quickstart import CHAT
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run.folder import ASSETS
from posttrain.serve.app import make_app
from posttrain.serve.asking import generation_of
from tests.serve.serving import TOKEN, running, settings_with

TINY = ASSETS / "tiny_base"
HELLO = [{"role": "user", "content": "Hello! What is 3 + 4?"}]
ASKED = [{"role": "user", "content": "Please check the code in pona."}]
CHECK = {
    "type": "function",
    "function": {
        "name": "check_code",
        "description": "check a code",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOL = Tool(**{key: CHECK["function"][key] for key in ("name", "description", "parameters")})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(settings_with(TINY, tmp_path_factory.mktemp("runs"), "tiny")) as at:
        yield at


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def render():
    return renderer(CHAT, Tokenizer.load(TINY))


@pytest.fixture(scope="module")
def sampler(render):
    return InProcessSampler(load_model(TINY), render.stop_tokens, "float32", 65536)


def sampled(sampler, prompt, tokens, temperature=0.0, seed=0):
    how = Sampling(temperature=temperature, top_p=1.0, top_k=None, max_new_tokens=tokens, max_turns=1)
    [turn] = sampler.sample([prompt], [seed], how)
    return turn


def conversation(messages, tools=()):
    return Conversation(messages=tuple(Message(role=m["role"], content=m["content"]) for m in messages), tools=tools)


def told_by(reader, tokens):
    """(analysis, everything else) of a completion."""
    pieces = [*reader.read(tokens), *reader.end()]
    texts = {True: "", False: ""}
    for piece in pieces:
        texts[piece.channel == "analysis"] += piece.text
    return texts[True], texts[False]


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'huge' does not exist"):
        client.models.retrieve("huge")


def test_a_greedy_answer_is_the_samplers(client, sampler, render):
    prompt = render.prompt(conversation(HELLO))
    expected = sampled(sampler, prompt, 60)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=60)
    thought, said = told_by(render.reader(), expected.tokens)
    message = answer.choices[0].message
    assert (message.content, getattr(message, "reasoning_content", "")) == (said, thought)
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == len(expected.tokens)
    ids = client.completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=60, logprobs=1, extra_body={"return_token_ids": True}
    ).choices[0]
    assert ids.token_ids == expected.tokens and ids.prompt_token_ids == prompt
    assert ids.finish_reason == expected.ended
    assert ids.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_says_what_the_whole_answer_says(client, seed):
    asked = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 50, "seed": seed}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(
            **asked, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    message = whole.choices[0].message
    assert "".join(one.delta.content or "" for one in deltas) == (message.content or "")
    thought = "".join(getattr(one.delta, "reasoning_content", None) or "" for one in deltas)
    assert thought == getattr(message, "reasoning_content", "")
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    logprobs = [token for one in deltas if one.logprobs for token in one.logprobs.content]
    assert [token.token for token in logprobs] == [token.token for token in whole.choices[0].logprobs.content]
    assert [token.logprob for token in logprobs] == pytest.approx(
        [token.logprob for token in whole.choices[0].logprobs.content], abs=1e-5
    )
    assert len(logprobs) == whole.usage.completion_tokens
    for token in logprobs:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.logprob - 1e-5


def load(client, name, folder, **more):
    client.post("/load_lora_adapter", body={"lora_name": name, "lora_path": str(folder), **more}, cast_to=str)


@pytest.fixture(scope="module")
def caller(client, server, render):
    """An adapter that has learned one conversation by heart: a thought, a call, an answer from its result.

    In words that the tiny base knows: of others its head cannot be moved.
    """
    said = [
        Message(role="user", content=ASKED[0]["content"]),
        Message(role="assistant", channel="analysis", content="Read the id."),
        call("check_code", {"city": "pona"}),
        tool_result("check_code", "18 degrees"),
        Message(role="assistant", channel="final", content="The id is 18."),
    ]
    rendered = render.render(Conversation(messages=tuple(said), tools=(TOOL,)))
    row = pack([Item(np.empty(0, np.int64), (np.array(rendered.tokens),), (np.array(rendered.targets),))], 0)
    model = load_model(TINY)
    adapters.attach(model, Lora(kind="lora", rank=16, alpha=32, targets=("q_proj", "v_proj", "o_proj", "experts")))
    adapters.initialise(model, torch.Generator().manual_seed(0))
    unfreeze_adapter(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3)
    for _ in range(40):
        loss = -batch_logprobs(model, row, "float32").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    adapters.save(model, server.settings.runs_dir / "caller", "tiny")
    load(client, "caller", server.settings.runs_dir / "caller")
    yield "caller"
    client.post("/unload_lora_adapter", body={"lora_name": "caller"}, cast_to=str)


def test_a_tool_is_called_and_its_result_read(client, caller):
    asked = {"model": caller, "tools": [CHECK], "temperature": 0, "max_tokens": 60}
    first = client.chat.completions.create(messages=ASKED, tool_choice="auto", **asked).choices[0]
    [made] = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and first.message.content is None
    assert first.message.reasoning_content == "Read the id."
    assert (made.type, made.function.name, json.loads(made.function.arguments)) == (
        "function", "check_code", {"city": "pona"},
    )  # fmt: skip
    with client.chat.completions.stream(messages=ASKED, **asked) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == made.function.arguments and streamed.id
    history = [*ASKED, first.message.model_dump(), {"role": "tool", "tool_call_id": made.id, "content": "18 degrees"}]
    last = client.chat.completions.create(messages=history, **asked).choices[0]
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "The id is 18.", None)


def test_a_tool_that_is_named_is_called(client, caller, render, sampler):
    named = {"type": "function", "function": {"name": "check_code"}}
    for choice in (named, "required"):
        answer = client.chat.completions.create(
            model=caller, messages=ASKED, tools=[CHECK], tool_choice=choice, temperature=0, max_tokens=60
        ).choices[0]
        assert answer.message.tool_calls[0].function.arguments == '{"city":"pona"}'
        assert not hasattr(answer.message, "reasoning_content")


def test_a_completion_that_is_no_message_says_so(client):
    """At a high temperature the tiny base forgets its format."""
    answers = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=3.0, max_tokens=300, n=16, seed=0
    ).choices
    faulty = [answer for answer in answers if hasattr(answer, "fault")]
    assert faulty and all(answer.fault and answer.finish_reason == "stop" for answer in faulty)


def test_tools_that_are_not_to_be_called_are_not_offered(client, render):
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[CHECK],
        tool_choice="none",
        max_tokens=1,
        extra_body={"return_token_ids": 1},
    )
    assert answer.choices[0].prompt_token_ids == render.prompt(conversation(HELLO))


def test_a_prompt_is_echoed_with_its_log_probabilities(client, sampler):
    text = "The weather in Paris is"
    echoed = client.completions.create(model="tiny", prompt=text, echo=True, max_tokens=0, logprobs=2).choices[0]
    ids = sampler_tokens = Tokenizer.load(TINY).encode(text)
    assert echoed.text == text and echoed.finish_reason == "length"
    assert "".join(echoed.logprobs.tokens) == text
    assert echoed.logprobs.token_logprobs[0] is None and echoed.logprobs.top_logprobs[0] is None
    for place in range(1, len(ids)):
        [turn] = sampler.sample([sampler_tokens[:place]], [0], Sampling(
            temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=1, max_turns=1))  # fmt: skip
        best = max(echoed.logprobs.top_logprobs[place].values())
        assert best == pytest.approx(turn.logprobs[0], abs=1e-4)
        assert text[echoed.logprobs.text_offset[place] :].startswith(echoed.logprobs.tokens[place])
    further = client.completions.create(model="tiny", prompt=text, echo=True, max_tokens=5, temperature=0)
    assert further.choices[0].text.startswith(text) and further.usage.completion_tokens <= 5


def test_a_stop_text_ends_the_answer_before_it(client):
    asked = {"model": "tiny", "prompt": "one two three four", "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**asked).choices[0].text
    assert len(text) > 12
    stop = text[7:10]
    cut = client.completions.create(**asked, stop=[stop, "never written"])
    assert cut.choices[0].text == text[: text.find(stop)] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 40
    chunks = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.find(stop)]


def test_several_answers_and_prompts_have_seeds_of_their_own(client):
    asked = {"model": "tiny", "prompt": ["a b c", "d e f"], "n": 3, "max_tokens": 12, "temperature": 1.0}
    first, again = (client.completions.create(**asked, seed=5) for _ in range(2))
    assert [choice.index for choice in first.choices] == list(range(6))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) > 3
    one = client.completions.create(model="tiny", prompt="a b c", max_tokens=12, temperature=1.0, seed=5)
    assert one.choices[0].text == first.choices[0].text
    likely = client.completions.create(**asked | {"n": 8, "prompt": "a b c"}, extra_body={"top_k": 1})
    assert len({choice.text for choice in likely.choices}) == 1


def test_sixteen_clients_at_once_get_what_each_gets_alone(client, server, sampler):
    """Beside others the last bits of a logit differ, so tokens are equal but for ties; here there are none."""
    rng = np.random.default_rng(0)
    asked = [
        {
            "model": "tiny",
            "prompt": rng.integers(20, 800, size=rng.integers(3, 120)).tolist(),
            "max_tokens": int(rng.integers(8, 60)),
            "temperature": [0.0, 0.7, 1.0][number % 3],
            "seed": number,
            "stream": number % 2 == 0,
            "extra_body": {"return_token_ids": True, "ignore_eos": True},
        }
        for number in range(16)
    ]

    def ids(body):
        told = client.completions.create(**body)
        if not body["stream"]:
            return told.choices[0].token_ids
        return [number for chunk in told for number in (getattr(chunk.choices[0], "token_ids", None) or ())]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ids, asked))
    for body, answer in zip(asked, answers, strict=True):
        alone = InProcessSampler(sampler.model, frozenset(), "float32", 65536)
        turn = sampled(alone, body["prompt"], body["max_tokens"], body["temperature"], body["seed"])
        assert answer == turn.tokens


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_slot(client, server, stream):
    live = generation_of(server.app).model("tiny").live
    body = {"model": "tiny", "prompt": [30, 40], "max_tokens": 60_000, "ignore_eos": True, "stream": stream}
    head = {"Authorization": f"Bearer {TOKEN}"}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=head, timeout=20) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
            assert live.count == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, headers=head, timeout=0.5)
    for _ in range(200):
        if not live.busy:
            break
        time.sleep(0.05)
    assert not live.busy
    assert client.completions.create(model="tiny", prompt=[30, 40], max_tokens=3).usage.completion_tokens <= 3


def test_adapters_are_asked_beside_their_base(client, server, tmp_path_factory):
    model = load_model(TINY)
    adapters.attach(model, Lora(kind="lora", rank=2, alpha=4, targets=("q_proj", "experts")))
    generator = torch.Generator().manual_seed(1)
    adapters.initialise(model, generator)
    for _, module in adapters.adapted(model):
        module.lora_B.data.normal_(std=0.5, generator=generator)
    folder = server.settings.runs_dir / "some" / "adapter"
    adapters.save(model, folder, "tiny")
    load(client, "mine", folder)
    assert "mine" in [one.id for one in client.models.list()]
    with pytest.raises(openai.BadRequestError, match="'mine' is taken"):
        load(client, "mine", folder)
    load(client, "mine", folder, load_inplace=True)
    prompt = list(range(30, 60))
    names = ["tiny", "mine"] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda name: client.completions.create(
                    model=name, prompt=prompt, max_tokens=30, temperature=0,
                    extra_body={"return_token_ids": True, "ignore_eos": True},
                ).choices[0].token_ids,
                names,
            )
        )  # fmt: skip
    for name, answer in zip(names, answers, strict=True):
        weights = model if name == "mine" else load_model(TINY)
        turn = sampled(InProcessSampler(weights, frozenset(), "float32", 4096), prompt, 30)
        assert answer == turn.tokens
    assert answers[0] != answers[1]
    client.post("/unload_lora_adapter", body={"lora_name": "mine"}, cast_to=str)
    with pytest.raises(openai.NotFoundError, match="'mine' does not exist"):
        client.completions.create(model="mine", prompt=prompt, max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="'mine' is not loaded"):
        client.post("/unload_lora_adapter", body={"lora_name": "mine"}, cast_to=str)


BAD = [
    ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
    ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'wizard'"),
    ("chat/completions", {"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "not text"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages", "ends in a user"),
    ("chat/completions", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools.0.function", "required"),
    ("chat/completions", {"messages": HELLO, "tools": [{"type": "retrieval", "function": {"name": "f"}}]},
     "tools.0.type", "function"),
    ("chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]},
     "tools.0.function.name", "pattern"),
    ("chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "properties": [1, 2]}}}]},
     "tools.0.function.parameters", "properties"),
    ("chat/completions", {"messages": HELLO, "tools": [CHECK], "tool_choice": {
        "type": "function", "function": {"name": "other"}}}, None, "'other'"),
    ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, None, "0 tools are offered"),
    ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format.type",
     "text"),
    ("chat/completions", {"messages": HELLO, "frequency_penalty": 0.5}, "frequency_penalty", "less than or equal"),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, None, "needs logprobs"),
    ("chat/completions", {"messages": HELLO, "wonder": 1}, "wonder", "Extra inputs"),
    ("chat/completions", {"messages": HELLO, "max_tokens": 70_000}, None, "room for 65,536 tokens"),
    ("chat/completions", {"messages": [{"role": "user", "content": "word " * 80_000}]}, None, "room for 65,536"),
    ("completions", {"prompt": ""}, None, "prompt is empty"),
    ("completions", {"prompt": [10**6]}, None, "token id 1000000"),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature", "greater than or equal"),
    ("completions", {"prompt": "x", "max_tokens": 0}, None, "with echo"),
    ("completions", {"prompt": "x", "best_of": 4}, None, "best_of is 4"),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, None, "does not lie in the runs folder"),
    ("load_lora_adapter", {"lora_name": "../x", "lora_path": "/etc"}, "lora_name", "pattern"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, param, says", BAD)
def test_bad_input_is_refused_in_openais_shape(server, path, body, param, says):
    named = {} if path == "load_lora_adapter" else {"model": "tiny"}
    answer = httpx.post(f"{server.url}/v1/{path}", json=named | body, headers={"Authorization": f"Bearer {TOKEN}"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"] and error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


def _asked(server, **how):
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": TOKEN, "max_retries": 0} | how)


REFUSED = [
    ({"api_key": "wrong"}, openai.AuthenticationError, "the token is absent or wrong", "invalid_api_key"),
    ({"default_headers": {"Authorization": ""}}, openai.AuthenticationError, "the token is absent", "invalid_api_key"),
    ({"default_headers": {"Origin": "http://evil.example"}}, openai.PermissionDeniedError, "another site", None),
    ({"default_headers": {"Host": "evil.example"}}, openai.APIStatusError, "not served here", None),
]


@pytest.mark.parametrize("how, kind, says, code", REFUSED)
def test_who_may_not_ask_is_told_why_by_openais_client(server, how, kind, says, code):
    with pytest.raises(kind, match=says) as refused:
        _asked(server, **how).models.list()
    error = refused.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", None, code)
    assert says in error.body["message"] and error.body.keys() == {"message", "type", "param", "code"}


def test_what_reaches_no_endpoint_is_refused_in_openais_shape_too(client, server):
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found") as refused:
        client.embeddings.create(model="tiny", input="x")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.APIStatusError, match="GET /v1/completions: Method Not Allowed") as refused:
        client.get("/completions", cast_to=str)
    assert refused.value.status_code == 405 and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.APIStatusError, match="longer than 1,000,000 bytes") as refused:
        client.completions.create(model="tiny", prompt="x" * 1_000_001)
    assert refused.value.status_code == 413 and refused.value.type == "invalid_request_error"
    elsewhere = httpx.get(f"{server.url}/api/nothing", headers={"Authorization": f"Bearer {TOKEN}"})
    assert elsewhere.headers["content-type"] == "application/problem+json"
    assert elsewhere.json()["detail"] == "GET /api/nothing: Not Found"


def test_an_unknown_model_and_a_body_that_is_no_json(client, server, tmp_path):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="../../etc", messages=HELLO)
    assert refused.value.code == "model_not_found" and refused.value.param == "model"
    head = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=b"{", headers=head)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]
    answer = httpx.post(f"{server.url}/v1/completions", content=b"\xff\xfe", headers=head)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_wrong_adapter_is_refused_and_nothing_changes(client, server):
    root = server.settings.runs_dir
    other = root / "other"
    model = load_model(TINY)
    adapters.attach(model, Lora(kind="lora", rank=2, alpha=4, targets=("q_proj",)))
    adapters.save(model, other, "tiny")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "k_proj"]}))
    (root / "link").symlink_to("/etc")
    for folder, error, says in (
        (other, openai.BadRequestError, "made for another model"),
        (root / "missing", openai.NotFoundError, "no adapter found"),
        (root / "link", openai.BadRequestError, "does not lie in"),
    ):
        with pytest.raises(error, match=says):
            load(client, "x", folder)
    assert "x" not in [one.id for one in client.models.list()]
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices


def test_a_server_that_stops_tells_who_waits(tmp_path):
    with running(settings_with(TINY, tmp_path, "tiny")) as at:
        generation = generation_of(at.app)
        client = openai.OpenAI(base_url=f"{at.url}/v1", api_key=TOKEN, max_retries=0, timeout=30)
        ask = {"model": "tiny", "prompt": "x", "max_tokens": 60_000, "extra_body": {"ignore_eos": True}}
        client.completions.create(**ask | {"max_tokens": 1})
        threading.Timer(0.3, generation.close).start()
        with pytest.raises(openai.InternalServerError, match="the server was stopped"):
            client.completions.create(**ask)


def test_no_request_makes_the_server_fail(tmp_path):
    """Bodies made up from the OpenAPI document, for a model that is there and few tokens."""
    app = make_app(settings_with(TINY, tmp_path, "tiny"))
    head = {"Authorization": f"Bearer {TOKEN}", "Host": "localhost"}
    document = schemathesis.openapi.from_asgi("/openapi.json", app, headers=head).include(path_regex="^/v1/")
    seen = Counter()
    for result in document.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers(case):
            if isinstance(case.body, dict) and case.operation.path.endswith("completions"):
                case.body |= {"model": "tiny", "max_tokens": 3}
                case.body.pop("max_completion_tokens", None)
                if isinstance(case.body.get("n"), int):
                    case.body["n"] = min(case.body["n"], 2)
            answer = case.call(headers=head)
            seen[case.operation.path, answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert answer.json().keys() == {"error"}, answer.text

        answers()
    generation_of(app).close()
    assert seen["/v1/completions", 200] and seen["/v1/completions", 400] and seen["/v1/chat/completions", 400]
