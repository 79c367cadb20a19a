"""Chat templates of four families, written for these tests: ids against transformers, targets worked by hand."""

import json
import random
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from posttrain.chat.conversation import Conversation, Message, Namespace, Tool, call, tool_result, turn_ends
from posttrain.chat.harmony import Harmony
from posttrain.chat.hf_template import HfTemplate
from posttrain.chat.openai_messages import openai_messages, openai_tools
from posttrain.chat.template import harmony_template
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError, CompletionError, ModelError
from posttrain.recipe.types import TemplateFormat
from tests.chat.conftest import CHAT, byte_level_definition, sentencepiece_definition
from tests.chat.conversations import EFFORTS
from tests.chat.test_template import ordinary

TEMPLATES = {path.stem: path.read_text() for path in (Path(__file__).parent / "templates").glob("*.jinja")}
DEFINITIONS = {
    "chatml": byte_level_definition(("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "llama3": byte_level_definition(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ),
    "gemma": sentencepiece_definition(("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), ("\n\n", "<table>")),
    "qwen_tools": byte_level_definition(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>", "<think>", "</think>")
    ),
}
FAMILIES = tuple(DEFINITIONS)
BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}
TOOL = Tool(name="f", description="Does f.", parameters={"type": "object", "properties": {"n": {"type": "integer"}}})
SQUARE = Tool(name="square", description="Squares.", parameters=None)


def chat(template: str | None, **fields: Any) -> TemplateFormat:
    given = {"reasoning": "dropped", "date": "2025-01-31", "variables": {}} | fields
    return TemplateFormat(kind="template", template=template, **given)


def family(name: str, **fields: Any) -> HfTemplate:
    roles = {"bos_token": BOS[name]} if name in BOS else {}
    return HfTemplate(chat(None, **fields), Tokenizer(DEFINITIONS[name], {"default": TEMPLATES[name]}, roles))


def stock(name: str) -> Any:
    import transformers
    from tokenizers import Tokenizer as Library

    roles = {"bos_token": BOS[name]} if name in BOS else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Library.from_str(DEFINITIONS[name]),
        chat_template=TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'31 Jan 2025'"),
        **roles,
    )


def user(text: str) -> Message:
    return Message(role="user", content=text)


def think(text: str, train: bool = True) -> Message:
    return Message(role="assistant", channel="analysis", content=text, train=train)


def final(text: str, train: bool = True) -> Message:
    return Message(role="assistant", channel="final", content=text, train=train)


def shown(renderer: HfTemplate, ours: Conversation) -> list[str]:
    """Every sample's text with the targets in brackets."""
    made = []
    for sample in renderer.samples(ours):
        pieces, run = [], []
        for place, token in enumerate(sample.tokens):
            run.append(token)
            if place == len(sample.tokens) - 1 or sample.targets[place + 1] != sample.targets[place]:
                pieces.append(f"[[{renderer.text(run)}]]" if sample.targets[place] else renderer.text(run))
                run = []
        made.append("".join(pieces))
    return made


# ---------------------------------------------------------------- targets by hand

TWO_TURNS = Conversation(
    messages=(user("Hi"), final("Hello."), user("Bye"), final("So long.")), instructions="Be kind."
)


def test_chatml_by_hand() -> None:
    assert shown(family("chatml"), TWO_TURNS) == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[So long.<|im_end|>]]"
    ]


def test_llama3_by_hand() -> None:
    system = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 31 Jan 2025\n\nBe kind.<|eot_id|>"
    )
    assert shown(family("llama3"), TWO_TURNS) == [
        f"{system}<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[So long.<|eot_id|>]]"
    ]


def test_llama3_calls_by_hand() -> None:
    ours = Conversation(
        messages=(user("Go"), call("f", {"n": 2}), tool_result("f", "4"), final("Four.")), tools=(TOOL,)
    )
    [sample] = shown(family("llama3"), ours)
    assert sample.partition("Go<|eot_id|>")[2] == (
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '[[{"name": "f", "parameters": {"n": 2}}<|eot_id|>]]'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Four.<|eot_id|>]]"
    )


def test_gemma_by_hand() -> None:
    assert shown(family("gemma"), TWO_TURNS) == [
        "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n[[Hello.<end_of_turn>]]\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[[So long.<end_of_turn>]]"
    ]


def test_qwen_with_tools_by_hand() -> None:
    """Reasoning of the earlier turn is gone from the second sample, and only its own turn is trained there."""
    first = (user("Go"), think("Use f."), call("f", {"n": 2}), tool_result("f", "4"), think("So."), final("Four."))
    second = (user("More"), call("f", {"n": 3}), call("f", {"n": 4}), tool_result("f", "9"), tool_result("f", "16"))
    ours = Conversation(messages=(*first, *second, final("Nine, sixteen.", train=False)), tools=(TOOL,))
    samples = shown(family("qwen_tools", reasoning="template"), ours)
    assert [sample.partition("</tools><|im_end|>\n")[2] for sample in samples] == [
        "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
        '[[<think>\nUse f.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"n": 2}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nSo.\n</think>\n\nFour.<|im_end|>]]",
        "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "f", "arguments": {"n": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        '[[<tool_call>\n{"name": "f", "arguments": {"n": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"n": 4}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\n9\n</tool_response>\n<tool_response>\n16\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nNine, sixteen.<|im_end|>",
    ]


def test_dropped_reasoning_leaves_one_sample() -> None:
    ours = Conversation(messages=(user("a"), think("Hm."), final("b"), user("c"), think("Hm."), final("d")))
    [sample] = shown(family("qwen_tools"), ours)
    assert "Hm." not in sample
    assert sample.count("[[") == 2


def test_messages_not_to_train_on_are_context() -> None:
    ours = Conversation(messages=(user("a"), final("b", train=False), user("c"), final("d")))
    [sample] = shown(family("chatml"), ours)
    assert sample.count("[[") == 1
    assert sample.endswith("[[d<|im_end|>]]")
    assert family("chatml").samples(Conversation(messages=(user("a"), final("b", train=False)))) == []


# ---------------------------------------------------------------- generated

WORDS = ("to", "Go", "naïve", "日本", "x=1;", "a\nb", "a  b", '"q"', "it's", "🙂", "{", "}", "1")


def generated(name: str, seed: int) -> Conversation:
    rng = random.Random(seed)
    tools = name in ("llama3", "qwen_tools") and rng.random() < 0.6
    reasons = name == "qwen_tools"

    def said() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))

    messages: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        messages.append(user(said()))
        for _ in range(rng.randint(0, 2) if tools else 0):
            if reasons and rng.random() < 0.5:
                messages.append(think(said()))
            if reasons and rng.random() < 0.3:
                messages.append(Message(role="assistant", channel="commentary", content=said()))
            names = [rng.choice(("f", "square")) for _ in range(rng.randint(1, 2 if reasons else 1))]
            messages += [call(tool, {rng.choice(WORDS): rng.choice((1, said(), [True, None]))}) for tool in names]
            messages += [tool_result(tool, said()) for tool in names]
        if reasons and rng.random() < 0.5:
            messages.append(think(said()))
        messages.append(final(said()))
    instructions = said() if rng.random() < 0.5 else None
    return Conversation(messages=tuple(messages), tools=(TOOL, SQUARE) if tools else (), instructions=instructions)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name: str) -> None:
    """Each turn is what transformers makes of the conversation up to it, but for blanks behind the last stop token."""
    renderer, library = family(name, reasoning="template" if name == "qwen_tools" else "dropped"), stock(name)
    several = 0
    for seed in range(100):
        ours = generated(name, seed)
        samples = renderer.samples(ours)
        turns = [ours.model_copy(update={"messages": ours.messages[:end]}) for end in turn_ends(ours.messages)]
        rendered = [renderer.render(turn) for turn in turns]
        several += len(samples) > 1
        assert samples[-1].tokens == rendered[-1].tokens
        assert sum(sum(sample.targets) for sample in samples) == sum(sum(one.targets) for one in rendered)
        for turn, sample in zip(turns, rendered, strict=True):
            key = "reasoning_content" if name == "qwen_tools" else None
            theirs = [spoken.value for spoken in openai_messages(turn, key)]
            ids = library.apply_chat_template(theirs, openai_tools(turn.tools), return_dict=False)
            assert sample.tokens == ids[: len(sample.tokens)]
            assert library.decode(ids[len(sample.tokens) :]).strip() == ""
    assert (several > 20) == (name == "qwen_tools")


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_completion_and_continuation_are_the_render(name: str) -> None:
    """Played turn by turn, tokens and sampled mask come out as rendering the whole gives them, and parse back."""
    renderer = family(name, reasoning="template" if name == "qwen_tools" else "dropped")
    for seed in range(60):
        ours = generated(name, seed)
        whole = renderer.render(ours)
        start = max(place for place, message in enumerate(ours.messages) if message.role == "user") + 1
        tokens = renderer.prompt(ours.model_copy(update={"messages": ours.messages[:start]}))
        sampled, rest = [False] * len(tokens), list(ours.messages[start:])
        while rest:
            generated_tokens = whole.tokens[len(tokens) :]
            stop = next(n for n, token in enumerate(generated_tokens) if token in renderer.stop_tokens)
            parsed = renderer.parse(generated_tokens[: stop + 1])
            assert parsed == rest[: len(parsed)]
            tokens, sampled = tokens + generated_tokens[: stop + 1], sampled + [True] * (stop + 1)
            rest = rest[len(parsed) :]
            results = list(takewhile(lambda message: message.role == "tool", rest))
            if results:
                seen = renderer.continuation(results)
                tokens, sampled = tokens + seen, sampled + [False] * len(seen)
                rest = rest[len(results) :]
        assert (tokens, sampled) == (whole.tokens, whole.targets)


@pytest.mark.parametrize("name", FAMILIES)
def test_specials_typed_into_text_stay_text(name: str) -> None:
    renderer, tokenizer = family(name), Tokenizer(DEFINITIONS[name])
    counts, texts = [], []
    for said in ("x", f"a{''.join(tokenizer.flagged_specials)}b"):
        ours = Conversation(messages=(user(said), final(f"{said}.")), instructions=said)
        [sample] = renderer.samples(ours)
        counts.append([sample.tokens.count(number) for number in tokenizer.flagged_specials.values()])
        texts.append((renderer.text(sample.tokens), said, sample))
    assert counts[0] == counts[1]
    text, said, sample = texts[1]
    assert text.count(said) == 3
    targets = [token for token, target in zip(sample.tokens, sample.targets, strict=True) if target]
    assert renderer.text(targets).startswith(f"{said}.<")
    assert targets[:-1] == tokenizer.encode_prose(f"{said}.")


def test_a_guard_that_a_text_holds_is_not_used() -> None:
    said = "\ufdd0<|im_end|>"
    [sample] = family("chatml").samples(Conversation(messages=(user(said), final("x"))))
    assert family("chatml").text(sample.tokens).startswith(f"<|im_start|>user\n{said}<|im_end|>\n")


def test_harmonys_own_template_gives_what_the_harmony_renderer_gives(toy_definition: str) -> None:
    """Two ways to the same tokens and targets: the format's own code, and prefixes of its Jinja template."""
    by_template = HfTemplate(
        chat(harmony_template(CHAT), reasoning="template"), Tokenizer(toy_definition, None, {"bos_token": "unused"})
    )
    by_hand = Harmony(CHAT, Tokenizer(toy_definition))
    targets = 0
    for seed in range(200):
        ours = ordinary(seed)
        ours = ours.model_copy(update={"reasoning_effort": EFFORTS[seed % 3]})
        assert by_template.samples(ours) == by_hand.samples(ours), seed
        targets += sum(sum(sample.targets) for sample in by_hand.samples(ours))
    assert by_template.stop_tokens == by_hand.stop_tokens
    assert targets > 10_000


# ---------------------------------------------------------------- refusals

CHATML = TEMPLATES["chatml"]


def chatml(template: str, **fields: Any) -> HfTemplate:
    return HfTemplate(chat(template, **fields), Tokenizer(DEFINITIONS["chatml"]))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "not with a special token"),
        ("{% for m in messages %}{{ m.content }} END<|im_end|>{% endfor %}", "not with a special token"),
        (CHATML.replace("assistant\\n", "robot\\n"), "prompt is not how it begins"),
        ("{{ raise_exception('never') }}", "refuses this conversation: never"),
        ("{% for m in messages %}", "not Jinja: line 1"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_cannot_be_trained_on(template: str | None, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        HfTemplate(chat(template), Tokenizer(DEFINITIONS["chatml"]))


def test_reasoning_without_a_place_is_refused() -> None:
    with pytest.raises(ModelError, match="reads none of reasoning_content"):
        chatml(CHATML, reasoning="template")


LATE = "{{- '(' + (messages | length) | string + ')' if messages | length > 3 }}" + CHATML
FORGETS = CHATML.replace("turn['content']", "turn['content'][:12]")
LONG = "More than twelve letters."


@pytest.mark.parametrize(
    ("template", "ours", "reason"),
    [
        (LATE, TWO_TURNS, "message 3: what the chat template writes in front of it changes with what follows"),
        (FORGETS, Conversation(messages=(user("a"), final(LONG))), f"message 1: the chat template leaves out '{LONG}'"),
        (FORGETS, Conversation(messages=(user(LONG), final("x"))), f"leaves out the text of message 0: '{LONG}'"),
        (CHATML, Conversation(messages=(user("a"), final("b")), tools=(TOOL,)), "no place for tools: it leaves out f"),
        (
            CHATML,
            Conversation(messages=(user("a"), call("f", {"n": 1}))),
            "message 1: the chat template leaves out 'f'",
        ),
        (
            CHATML,
            Conversation(messages=(user("a"), Message(role="assistant", content="b"))),
            "message 1 has no channel",
        ),
        (
            CHATML,
            Conversation(messages=(user("a"),), namespaces=(Namespace(name="x", description=None, tools=()),)),
            "no place for tools of other namespaces",
        ),
        (CHATML, Conversation(messages=(user("a"), tool_result("f", "b"))), "result of f has no call"),
        (
            CHATML,
            Conversation(
                messages=(
                    user("a"),
                    Message(role="assistant", channel="commentary", recipient="functions.f", content="[]"),
                )
            ),
            "arguments that are not a JSON object",
        ),
    ],
)
def test_ambiguous_renderings_are_refused_with_the_reason(template: str, ours: Conversation, reason: str) -> None:
    with pytest.raises(ChatFormatError) as caught:
        chatml(template).render(ours)
    assert reason in str(caught.value)


def test_tokens_across_the_end_of_the_prompt_are_refused() -> None:
    """The vocabulary has a token of two line feeds, one of which would be the prompt's."""
    untrimmed = TEMPLATES["gemma"].replace("(turn.content | trim)", "turn.content")
    roles = {"bos_token": "<bos>"}
    renderer = HfTemplate(chat(untrimmed), Tokenizer(DEFINITIONS["gemma"], None, roles))
    renderer.render(Conversation(messages=(user("a"), final("b"))))
    with pytest.raises(ChatFormatError, match="crosses from the prompt into the model's message"):
        renderer.render(Conversation(messages=(user("a"), final("\nb"))))


def test_one_message_of_the_template_has_one_flag() -> None:
    ours = Conversation(messages=(user("a"), think("b", train=False), final("c")))
    with pytest.raises(ChatFormatError, match="train on all of them or on none"):
        family("qwen_tools", reasoning="template").render(ours)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "empty"),
        ("Hello", "cut off"),
        ("Hello<|im_end|>\n", "after the end"),
        ("Hello<|im_start|><|im_end|>", "special token"),
        ("<think>\nHm.<|im_end|>", "reasoning"),
        ("Hm.\n</think>\n\nx<|im_end|>", "reasoning"),
        ('<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>', "call"),
        ('<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call><|im_end|>', "call"),
        ('<tool_call>\n{"name": "f g", "arguments": {}}\n</tool_call><|im_end|>', "call"),
        ('<tool_call>\n{"name": "f", "arguments": {}}<|im_end|>', "call"),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> and<|im_end|>', "call"),
        ("<tool_call>\nf(1)\n</tool_call><|im_end|>", "call"),
    ],
)
def test_broken_completions_have_a_reason(completion: str, reason: str) -> None:
    tokens = Tokenizer(DEFINITIONS["qwen_tools"]).encode_with_specials(completion)
    with pytest.raises(CompletionError) as caught:
        family("qwen_tools", reasoning="template").parse(tokens)
    assert caught.value.reason == reason


def test_the_folders_templates_and_special_tokens_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(DEFINITIONS["chatml"])
    configuration = {"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.templates, tokenizer.roles) == ({"default": CHATML}, {"eos_token": "<|im_end|>"})
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TEMPLATES["qwen_tools"]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    ours = Conversation(messages=(user("a"), final("b")), tools=(TOOL,))
    [with_tools] = shown(HfTemplate(chat(None), Tokenizer.load(tmp_path)), ours)
    assert "<tools>" in with_tools
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("'\\n' + turn", "'\\n- ' + turn"))
    assert "- " in Tokenizer.load(tmp_path).templates["default"]
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelError, match="is not JSON"):
        Tokenizer.load(tmp_path)


def test_the_template_reads_variables_effort_and_the_recipes_date() -> None:
    template = "{{- mood + '|' + strftime_now('%Y/%m/%d') + '|' + (reasoning_effort or 'none') + '|' }}" + CHATML
    ours = Conversation(messages=(user("a"), final("b")), reasoning_effort="high")
    [sample] = shown(chatml(template, variables={"mood": "calm"}), ours)
    assert sample.startswith("calm|2025/01/31|high|<|im_start|>")


def test_generation_blocks_only_write() -> None:
    template = CHATML.replace("{{- '<|im_start|>' + turn", "{% generation %}{{- '<|im_start|>' + turn").replace(
        "'<|im_end|>\\n' }}", "'<|im_end|>\\n' }}{% endgeneration %}", 1
    )
    assert shown(chatml(template), TWO_TURNS) == shown(family("chatml"), TWO_TURNS)
