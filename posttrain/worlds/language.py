"""Language world: the text the tiny base learns from — copying, records, choosing, small Python, chat.

It holds the words of the other worlds and none of their tasks: no tool is declared or called, no code is repaired.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from posttrain.chat.harmony import developer_text, system_text
from posttrain.recipe.types import HarmonyFormat
from posttrain.worlds.names import NAME_LIKE, SYLLABLES, Split, name, names, split_of
from posttrain.worlds.programs import Program, draw, load, shown
from posttrain.worlds.tools import INTEGERS, PHRASES, VERBS, argument

Writer = Callable[[random.Random, Split], str]

SPECIALS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>")
STOCK = (*SYLLABLES, *SPECIALS, *' {}":,()[]=+-*<>_.0123456789', "\n", " the", " a", " for", " in", "return ", '","')
IDENTITIES = (
    "You are a small assistant.",
    "You are a helpful assistant.",
    "You are ChatGPT, a large language model trained by OpenAI.",
)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# ---------------------------------------------------------------- copying


def _piece(rng: random.Random, split: Split) -> str:
    draw_kind = rng.random()
    if draw_kind < 0.6:
        return name(rng, split)
    if draw_kind < 0.75:
        return str(rng.randint(0, 9999))
    if draw_kind < 0.9:
        return rng.choice(SYLLABLES) + rng.choice(("_", "-", ".")) + name(rng, split)
    return rng.choice(VERBS)


def _copy_list(rng: random.Random, split: Split) -> str:
    joint = rng.choice((" ", ", ", "\n", " and ", ","))
    text = joint.join(_piece(rng, split) for _ in range(rng.randint(2, 14)))
    again = rng.choice(("copy", "again", "the same", "repeat"))
    return f"text: {text}\n{again}: {text}"


def _copy_specials(rng: random.Random, split: Split) -> str:
    parts = []
    for _ in range(rng.randint(3, 12)):
        parts += [rng.choice(SPECIALS), rng.choice(("", _piece(rng, split), f" to={_piece(rng, split)}"))]
    text = "".join(parts)
    return f"{text}\n{text}"


def _copy_random(rng: random.Random, split: Split) -> str:
    return scrambled(rng, split, STOCK)


def scrambled(rng: random.Random, split: Split, stock: tuple[str, ...]) -> str:
    """Pieces of `stock` in no order, several times over: nothing but the copy can be predicted."""
    while True:
        text = "".join(rng.choices(stock, k=rng.randint(6, 32)))
        copies = text * rng.choice((2, 3, 4, 5))
        # Syllables that meet by chance must not spell a name of the other split.
        if all(split_of(word) == split for word in NAME_LIKE.findall(copies)):
            return copies


def _recall(rng: random.Random, split: Split) -> str:
    """Pairs, then each asked for by its first half."""
    count = rng.randint(2, 8)
    keys = names(rng, split, count)
    values = [_piece(rng, split) for _ in keys]
    sign = rng.choice((": ", " is ", " = ", " has "))
    order = rng.sample(range(count), count)
    told = [f"{k}{sign}{v}" for k, v in zip(keys, values, strict=True)]
    return "\n".join([*told, "now", *(told[i] for i in order)])


# ---------------------------------------------------------------- records


def _facts(rng: random.Random, split: Split) -> dict[str, Any]:
    keys = rng.sample(list(PHRASES), rng.randint(1, 4))
    return {key: argument(rng, key, split) for key in keys}


def _told(rng: random.Random, facts: dict[str, Any]) -> str:
    spoken = [rng.choice(PHRASES[key]).format(value) for key, value in facts.items()]
    rng.shuffle(spoken)
    return " ".join(spoken)


def _sentence_to_json(rng: random.Random, split: Split) -> str:
    """A sentence, the keys in order, then the object with its values."""
    facts, verb, noun = _facts(rng, split), rng.choice(VERBS), name(rng, split)
    subject = rng.choice(("we", "I", "you", "they", name(rng, split)))
    sentence = f"{subject} {verb} {rng.choice(('the', 'a', 'one', 'this'))} {noun} {_told(rng, facts)}"
    keys = ", ".join(f"{key}: {'number' if key in INTEGERS else 'string'}" for key in facts)
    order = rng.random()
    if order < 0.45:
        return f"{sentence}.\n{keys}\n{_json(facts)}"
    if order < 0.9:
        return f"{keys}\n{sentence}.\n{_json(facts)}"
    return f"{_json(facts)}\n{sentence}."


def _block_to_json(rng: random.Random, split: Split) -> str:
    keys = rng.choice((rng.sample(list(PHRASES), rng.randint(1, 4)), names(rng, split, rng.randint(1, 4))))
    facts = {key: rng.choice((_piece(rng, split), argument(rng, "count", split))) for key in keys}
    block = "\n".join(f"{key}: {value if isinstance(value, int) else _json(value)}" for key, value in facts.items())
    return f"{block}\n{_json(facts)}" if rng.random() < 0.7 else f"{_json(facts)}\n{block}"


def _result(rng: random.Random, split: Split) -> dict[str, Any]:
    status = rng.choice(("done", "ok", "ready", "set", "late", "new"))
    return {"id": f"{name(rng, split)}-{rng.randint(10, 99)}", "status": status}


def _json_to_answer(rng: random.Random, split: Split) -> str:
    facts = _result(rng, split) if rng.random() < 0.5 else _facts(rng, split)
    key = rng.choice(list(facts))
    ask = rng.choice(("What is the {}?", "Tell me the {}.", "the {}?"))
    answer = rng.choice(("The {} is {}.", "It is {1}.", "Done, the {} is {}.", "{1}"))
    return f"{_json(facts)}\n{ask.format(key)}\n{answer.format(key, facts[key])}"


# ---------------------------------------------------------------- choosing


def _choose_compound(rng: random.Random, split: Split) -> str:
    """Names made of two words; the one made of the words asked for."""
    verbs, nouns = rng.sample(VERBS, 3), names(rng, split, 3)
    pairs = rng.sample([(v, n) for v in verbs for n in nouns], rng.randint(2, 5))
    listed = "\n".join(f"{v}_{n}" if rng.random() < 0.5 else f"{v}_{n}: {v} a {n}" for v, n in pairs)
    verb, noun = rng.choice(pairs)
    ask = rng.choice(
        ("who can {v} the {n}?", "we {v} the {n} {x}.", "{v} a {n} {x}", "the {n}: {v} it {x}.", "{v} it, the {n}")
    ).format(v=verb, n=noun, x=_told(rng, _facts(rng, split)))
    answer = rng.choice(("{}", "That is {}.", "Use {}.", "Name: {}"))
    return f"{listed}\n{ask}\n{answer.format(f'{verb}_{noun}')}"


def _choose_line(rng: random.Random, split: Split) -> str:
    keys, values = names(rng, split, 4), names(rng, split, 4)
    lines = [f"{k}: {rng.choice(VERBS)} {v}" for k, v in zip(keys, values, strict=True)]
    at = rng.randrange(4)
    ask, answer = rng.choice((("with", keys[at]), ("line with", lines[at])))
    return "\n".join([*lines, f"{ask} {values[at]}: {answer}"])


def _join_words(rng: random.Random, split: Split) -> str:
    words = [rng.choice((rng.choice(VERBS), name(rng, split))) for _ in range(rng.randint(2, 3))]
    sign = rng.choice(("_", "_", "-", "."))
    return f"{' '.join(words)} with {sign}: {sign.join(words)}"


# ---------------------------------------------------------------- small Python


def _asserted(program: Program, arguments: tuple[Any, ...]) -> str:
    return f"assert {shown(arguments)} == {load(program.code())(*arguments)!r}"


def _function(rng: random.Random, split: Split) -> str:
    program = draw(rng, split)
    tests = rng.sample(program.inputs, min(len(program.inputs), rng.randint(0, 2)))
    return program.code() + "\n" + "\n".join(_asserted(program, arguments) for arguments in tests)


def _copy_code_line(rng: random.Random, split: Split) -> str:
    """A line of a function is asked for by its number or first word, plain or inside JSON."""
    program = draw(rng, split)
    lines = [line.strip() for line in program.body]
    at = rng.randrange(len(lines))
    ask = rng.choice((f"line {at + 1}", f"the line with {lines[at].split()[0]}"))
    given = rng.random()
    if given < 0.4:
        return f"{program.code()}\n{ask}: {lines[at]}"
    if given < 0.7:
        return f"{program.code()}\n{ask}: {_json({'line': lines[at]})}"
    other = rng.choice(lines)
    return f"{program.code()}\n{_json({'line': lines[at], 'other': other})}"


def _doc_to_code(rng: random.Random, split: Split) -> str:
    program = draw(rng, split)
    body = "\n".join(program.body)
    order = rng.random()
    if order < 0.5:
        return f"{program.doc}:\n{body}"
    if order < 0.8:
        return f"{program.doc}\n{_json({'code': body})}"
    return f"{body}\nmeans {program.doc}"


def _escaped(rng: random.Random, split: Split) -> str:
    text = f"{name(rng, split)}{rng.choice((chr(10), chr(34), chr(39), ' = '))}{name(rng, split)}"
    return f"{text}\n{_json({'text': text})}"


# ---------------------------------------------------------------- chat


def _exchange(rng: random.Random, split: Split) -> tuple[str, str, str]:
    """Request, thought, answer."""
    kind = rng.random()
    if kind < 0.3:
        text = " ".join(_piece(rng, split) for _ in range(rng.randint(1, 5)))
        return rng.choice(("Copy {}", "Please say {}", "Repeat: {}")).format(text), "Copy it.", text
    if kind < 0.55:
        facts = _facts(rng, split)
        keys = ", ".join(facts)
        ask = rng.choice(("JSON with {}: {}", "As JSON ({}): {}")).format(keys, _told(rng, facts))
        return ask, f"The keys are {keys}.", _json(facts)
    if kind < 0.75:
        facts = _result(rng, split)
        return f"{_json(facts)} What is the id?", "Read the id.", f"The id is {facts['id']}."
    if kind < 0.9:
        words = names(rng, split, rng.randint(2, 4))
        verb = rng.choice(VERBS)
        listed, word = ", ".join(f"{verb}_{w}" for w in words), rng.choice(words)
        return f"Choose from {listed}: {verb} the {word}.", "Find the name.", f"{verb}_{word}"
    program = draw(rng, split)
    return f"Write f: {program.doc}", "Write the function.", program.code()


def _chat(rng: random.Random, split: Split) -> str:
    chat = HarmonyFormat.model_construct(
        kind="harmony",
        date=f"202{rng.randint(4, 6)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        knowledge_cutoff="2024-06",
        reasoning_effort=rng.choice(("low", "low", "medium", "high")),
        identity=rng.choice(IDENTITIES),
    )
    text = f"<|start|>system<|message|>{system_text(chat, offers_tools=False)}<|end|>"
    if rng.random() < 0.3:
        instructions = rng.choice(("Be brief.", "Answer in one line."))
        text += f"<|start|>developer<|message|>{developer_text(instructions, ())}<|end|>"
    turns = rng.choice((1, 1, 2))
    for turn in range(turns):
        request, thought, answer = _exchange(rng, split)
        text += f"<|start|>user<|message|>{request}<|end|>"
        last = turn == turns - 1
        if last:
            text += f"<|start|>assistant<|channel|>analysis<|message|>{thought}<|end|>"
        text += f"<|start|>assistant<|channel|>final<|message|>{answer}{'<|return|>' if last else '<|end|>'}"
    return text


WRITERS: tuple[tuple[int, Writer], ...] = (
    (10, _copy_list),
    (8, _copy_specials),
    (12, _copy_random),
    (8, _recall),
    (13, _sentence_to_json),
    (6, _block_to_json),
    (5, _json_to_answer),
    (9, _choose_compound),
    (4, _choose_line),
    (2, _join_words),
    (7, _function),
    (8, _copy_code_line),
    (6, _doc_to_code),
    (2, _escaped),
    (8, _chat),
)
"""Weights out of their sum, by document."""
_WEIGHTS = [weight for weight, _ in WRITERS]
_FUNCTIONS = [writer for _, writer in WRITERS]


def document(rng: random.Random, split: Split) -> dict[str, Any]:
    return {"text": rng.choices(_FUNCTIONS, _WEIGHTS)[0](rng, split)}
