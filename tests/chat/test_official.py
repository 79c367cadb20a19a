"""Our rendering, id by id, against the official openai-harmony library on the real vocabulary."""

import random
from typing import Any

import pytest

from posttrain.chat.conversation import (
    Conversation,
    Message,
    Tool,
    call,
    is_builtin,
    tool_result,
    turn_ends,
    turn_start,
)
from posttrain.chat.harmony import DIFFERENCES, Harmony, channel_of
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError
from posttrain.recipe.types import HarmonyFormat
from tests.chat.conftest import CHAT, SPECIAL_IDS
from tests.chat.conversations import EFFORTS, conversation, text
from tests.chat.test_fuzz import broken, completions

SEEDS = range(800)


def as_official(ours: Conversation, chat: HarmonyFormat) -> Any:
    import openai_harmony as oh

    effort = oh.ReasoningEffort((ours.reasoning_effort or chat.reasoning_effort).capitalize())
    system = oh.SystemContent(model_identity=chat.identity, knowledge_cutoff=chat.knowledge_cutoff)
    system = system.with_conversation_start_date(chat.date).with_reasoning_effort(effort)
    for name in ours.builtin_tools:
        system = system.with_browser_tool() if name == "browser" else system.with_python_tool()
    messages = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    if ours.instructions is not None or ours.tools or ours.namespaces:
        developer = oh.DeveloperContent(instructions=ours.instructions)
        if ours.tools:
            developer = developer.with_function_tools(_described(ours.tools))
        for space in ours.namespaces:
            declared = oh.ToolNamespaceConfig(
                name=space.name, description=space.description, tools=_described(space.tools)
            )
            developer = developer.with_tools(declared)
        messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    for message in ours.messages:
        author = oh.Author(role=oh.Role(message.role), name=message.sender)
        made = oh.Message.from_author_and_content(author, message.content)
        if message.role == "tool":
            made = made.with_recipient("assistant")
        if (channel := channel_of(message)) is not None:
            made = made.with_channel(channel)
        if message.recipient:
            content_type = "code" if is_builtin(message.recipient) else "<|constrain|>json"
            made = made.with_recipient(message.recipient).with_content_type(content_type)
        messages.append(made)
    return oh.Conversation.from_messages(messages)


def _described(tools: tuple[Tool, ...]) -> list[Any]:
    import openai_harmony as oh

    return [oh.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in tools]


def without_past_analysis(ours: Conversation) -> Conversation:
    last_turn = turn_start(ours.messages)
    kept = [m for place, m in enumerate(ours.messages) if place >= last_turn or channel_of(m) != "analysis"]
    return ours.model_copy(update={"messages": tuple(kept)})


def official_tokens(official: Any, ours: Conversation, chat: HarmonyFormat = CHAT, drop: bool = False) -> list[int]:
    import openai_harmony as oh

    config = oh.RenderConversationConfig(auto_drop_analysis=drop)
    tokens: list[int] = official.render_conversation_for_training(as_official(ours, chat), config)
    return tokens


def test_the_generator_reaches_every_shape() -> None:
    made = [conversation(seed) for seed in SEEDS]
    schemas = " ".join(str(tool.parameters) for ours in made for tool in ours.tools)
    for word in ("oneOf", "enum", "nullable", "default", "examples", "title", "items", "anyOf", "$ref", "integer"):
        assert word in schemas
    assert {m.channel for ours in made for m in ours.messages} == {"analysis", "commentary", "final", None}
    assert {bool(ours.messages[-1].recipient) for ours in made} == {True, False}
    assert max(sum(m.role == "user" for m in ours.messages) for ours in made) >= 3
    assert {ours.reasoning_effort for ours in made} == {None, "low", "medium", "high"}
    assert {name for ours in made for name in ours.builtin_tools} == {"browser", "python"}
    assert {space.description is None for ours in made for space in ours.namespaces} == {True, False}
    assert {bool(space.tools) for ours in made for space in ours.namespaces} == {True, False}
    assert any(tool.parameters is None for ours in made for tool in ours.tools)
    called = {m.recipient.split(".")[0] for ours in made for m in ours.messages if m.recipient}
    assert {"functions", "python", "browser", "calendar"} <= called


def test_every_conversation_has_the_librarys_ids(official: Any, o200k: Tokenizer) -> None:
    renderers = [Harmony(CHAT.model_copy(update={"reasoning_effort": effort}), o200k) for effort in EFFORTS]
    for seed in SEEDS:
        ours, chat = conversation(seed), CHAT.model_copy(update={"reasoning_effort": EFFORTS[seed % 3]})
        expected = official_tokens(official, without_past_analysis(ours), chat)
        rendered = renderers[seed % 3].render(ours)
        assert rendered.tokens == expected, f"seed {seed}\n{official.decode(expected)}"
        assert len(rendered.targets) == len(rendered.tokens)
        if not any(channel_of(message) == "analysis" for message in ours.messages):
            assert official_tokens(official, ours, chat, drop=True) == expected, "a difference that is not listed"


def test_every_sample_has_the_librarys_ids(official: Any, o200k: Tokenizer) -> None:
    """One sample per user turn, each the library's rendering of the conversation up to that turn's end."""
    harmony = Harmony(CHAT, o200k)
    several = 0
    for seed in SEEDS[::2]:
        ours = conversation(seed)
        samples = harmony.samples(ours)
        turns = [ours.model_copy(update={"messages": ours.messages[:end]}) for end in turn_ends(ours.messages)]
        assert [sample.tokens for sample in samples] == [
            official_tokens(official, without_past_analysis(turn)) for turn in turns
        ]
        assert samples[-1] == harmony.render(ours)
        several += len(samples) > 1
    assert several > 200


def test_prompts_have_the_librarys_ids(official: Any, o200k: Tokenizer) -> None:
    import openai_harmony as oh

    harmony = Harmony(CHAT, o200k)
    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    checked = 0
    for seed in SEEDS:
        ours = conversation(seed)
        ends = [n + 1 for n, message in enumerate(ours.messages) if message.role in ("user", "tool")]
        cut = ours.model_copy(update={"messages": ours.messages[: ends[seed % len(ends)]]})
        trimmed = as_official(without_past_analysis(cut), CHAT)
        assert harmony.prompt(cut) == official.render_conversation_for_completion(trimmed, oh.Role.ASSISTANT, config)
        checked += cut.messages[-1].role == "tool"
    assert checked > 50


def test_what_we_sample_parses_alike(official: Any, o200k: Tokenizer) -> None:
    import openai_harmony as oh

    harmony = Harmony(CHAT, o200k)
    for seed in SEEDS:
        ours = conversation(seed)
        last = max(n for n, message in enumerate(ours.messages) if message.role in ("user", "tool"))
        prompt = harmony.prompt(ours.model_copy(update={"messages": ours.messages[: last + 1]}))
        completion = harmony.render(ours).tokens[len(prompt) :]
        theirs = official.parse_messages_from_completion_tokens(completion, oh.Role.ASSISTANT)
        assert harmony.parse(completion) == list(ours.messages[last + 1 :])
        assert [(m.channel, m.recipient, m.content[0].text) for m in theirs] == [
            (m.channel, m.recipient, m.content) for m in ours.messages[last + 1 :]
        ]


def test_special_and_stop_tokens_are_the_librarys(official: Any, o200k: Tokenizer) -> None:
    assert {name: o200k.special(name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert Harmony(CHAT, o200k).stop_tokens == set(official.stop_tokens_for_assistant_actions())


def test_plain_text_is_encoded_as_the_library_encodes_it(official: Any, o200k: Tokenizer) -> None:
    for seed in range(1000):
        sample = text(random.Random(seed), 60)
        ids = o200k.encode(sample)
        assert ids == official.encode(sample, disallowed_special=())
        assert o200k.decode(ids) == sample


def test_what_we_accept_the_library_reads_alike(official: Any, o200k: Tokenizer) -> None:
    """On broken completions as on whole ones: a completion that we parse has the library's messages."""
    import openai_harmony as oh

    harmony = Harmony(CHAT, o200k)
    rng = random.Random(3)
    whole = completions(harmony, [conversation(seed) for seed in range(60)])
    accepted = 0
    for _ in range(4000):
        tokens = broken(rng, whole, o200k)
        try:
            ours = harmony.parse(tokens)
        except ChatFormatError:
            continue
        theirs = official.parse_messages_from_completion_tokens(tokens, oh.Role.ASSISTANT)
        assert [(m.channel, m.recipient, m.content[0].text) for m in theirs] == [
            (m.channel, m.recipient, m.content) for m in ours
        ]
        accepted += 1
    assert accepted > 200


# ---------------------------------------------------------------- the deliberate differences

USER = Message(role="user", content="Hello")
THINK = Message(role="assistant", channel="analysis", content="Think.")
FINAL = Message(role="assistant", channel="final", content="Hi.")
PROBE = (call("f", {"a": 1}), tool_result("f", "3"))


def test_the_list_of_differences_is_closed() -> None:
    assert set(DIFFERENCES) == {"kept-analysis", "dropped-analysis", "strict-parse"}


def test_kept_analysis(official: Any, o200k: Tokenizer) -> None:
    ours = Conversation(messages=(USER, THINK, *PROBE, THINK, FINAL))
    bare = Conversation(messages=(USER, *PROBE, FINAL))
    harmony = Harmony(CHAT, o200k)
    assert official_tokens(official, ours, drop=True) == harmony.render(bare).tokens
    assert official_tokens(official, ours, drop=False) == harmony.render(ours).tokens


def test_dropped_analysis(official: Any, o200k: Tokenizer) -> None:
    harmony = Harmony(CHAT, o200k)
    after_first_final = Conversation(messages=(USER, FINAL, USER, THINK, FINAL, USER, FINAL))
    bare = Conversation(messages=(USER, FINAL, USER, FINAL, USER, FINAL))
    assert harmony.render(after_first_final).tokens == harmony.render(bare).tokens
    assert official_tokens(official, bare) == harmony.render(bare).tokens
    assert official_tokens(official, after_first_final, drop=True) != harmony.render(bare).tokens
    ends_in_call = Conversation(messages=(USER, THINK, FINAL, USER, PROBE[0]))
    assert harmony.render(ends_in_call).tokens == official_tokens(official, without_past_analysis(ends_in_call))
    assert official_tokens(official, ends_in_call, drop=True) != harmony.render(ends_in_call).tokens


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("<|channel|>musing<|message|>x<|return|>", "is on channel 'musing'"),
        ("<|message|>x<|return|>", "has no channel"),
        ("<|channel|>final<|message|>x", "cut off"),
        ("<|channel|>commentary json<|message|>x<|call|>", "declared as JSON but calls no tool"),
        (" to=functions.f<|channel|>analysis<|message|>{}<|call|>", "calls go to commentary"),
        ("<|channel|>analysis<|message|>x<|end|>", "with neither a final nor a call"),
        ("<|channel|>final<|message|>x<|end|>", "not <|return|>"),
    ],
)
def test_strict_parse(official: Any, o200k: Tokenizer, completion: str, reason: str) -> None:
    import openai_harmony as oh

    tokens = o200k.encode_with_specials(completion)
    assert len(official.parse_messages_from_completion_tokens(tokens, oh.Role.ASSISTANT)) == 1
    with pytest.raises(ChatFormatError, match=reason.replace("|", r"\|")):
        Harmony(CHAT, o200k).parse(tokens)
