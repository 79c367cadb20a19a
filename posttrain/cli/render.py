"""`posttrain render FILE.jsonl`: conversations as the model sees them, and which of it is learned."""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from posttrain.chat.conversation import Conversation
from posttrain.chat.render import Rendered, Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.formats import messages
from posttrain.data.formats.format import BadRow
from posttrain.data.rows import ConversationRow
from posttrain.errors import ChatFormatError, DataError, InputError, ModelError
from posttrain.recipe.types import ChatFormat, GemmaFormat, HarmonyFormat, TemplateFormat
from posttrain.run.folder import RunFolder

LEARNED = "bold green"
OPENED, CLOSED = "⟦", "⟧"
"""Around what is learned where there is no colour."""


def _render(file: Path, model: str, as_json: bool, **given: Any) -> None:
    tokenizer = Tokenizer.load(_model_folder(model))
    chat = renderer(_format(given), tokenizer)
    for number, conversation in _conversations(file):
        try:
            samples = chat.samples(conversation)
        except ChatFormatError as error:
            raise DataError(f"{file} row {number}: {error}") from None
        if not samples:
            raise DataError(f"{file} row {number}: nothing in it is learned; it needs an assistant message to train on")
        for place, sample in enumerate(samples, 1):
            if as_json:
                _print_json(chat, number, sample)
            else:
                _print_text(chat, f"row {number}, sample {place} of {len(samples)}", sample)


def _model_folder(model: str) -> Path:
    folder = RunFolder(Path()).model_folder(model)
    if not folder.is_dir():
        raise ModelError(f"--model {model}: there is no such folder; give a model's folder, or shipped:tiny")
    return folder


def _format(given: dict[str, Any]) -> ChatFormat:
    match given["renderer"]:
        case "harmony":
            return HarmonyFormat(
                kind="harmony",
                date=given["date"],
                knowledge_cutoff=given["knowledge_cutoff"],
                reasoning_effort=given["effort"],
                identity=given["identity"],
            )
        case "gemma":
            return GemmaFormat(kind="gemma", reasoning="numbered" if given["keep_reasoning"] else "dropped")
    template: Path | None = given["template"]
    try:
        text = None if template is None else template.read_text(encoding="utf-8")
        reasoning = "template" if given["keep_reasoning"] else "dropped"
        return TemplateFormat(kind="template", template=text, reasoning=reasoning, date=given["date"], variables={})
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template {template}: cannot be read: {error}") from None
    except ValidationError:
        raise InputError(f"--date {given['date']}: write it as 2026-01-31") from None


def _conversations(file: Path) -> Iterator[tuple[int, Conversation]]:
    """Every line's conversation: a row of content `conversations`, a conversation alone, or OpenAI's messages."""
    number = 0
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield number, _conversation(json.loads(line))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'row'}: {one['msg']}" for one in error.errors())
        raise DataError(f"{file} row {number}: {reasons}") from None
    except BadRow as error:
        raise DataError(f"{file} row {number}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 after row {number}: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} row {number}: not JSON: {error}") from None
    if number == 0:
        raise DataError(f"{file}: there is no row in it")


def _conversation(value: Any) -> Conversation:
    if isinstance(value, dict) and "conversation" in value:
        return ConversationRow.model_validate(value).conversation
    if isinstance(value, dict) and not _is_ours(value.get("messages")):
        return messages.conversation(value)
    return Conversation.model_validate(value)


def _is_ours(said: Any) -> bool:
    """Whether a list of messages has fields that OpenAI's messages have not."""
    ours = {"channel", "recipient", "sender"}
    return isinstance(said, list) and any(isinstance(one, dict) and ours & one.keys() for one in said)


def _print_json(chat: Renderer, number: int, sample: Rendered) -> None:
    mask = [int(target) for target in sample.targets]
    row = {"row": number, "text": chat.text(sample.tokens), "tokens": sample.tokens, "loss_mask": mask}
    print(json.dumps(row, ensure_ascii=False))


def _print_text(chat: Renderer, title: str, sample: Rendered) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    learned = sum(sample.targets)
    text = Text(f"{title}: {len(sample.tokens)} tokens, {learned} learned\n", style="dim")
    runs = groupby(zip(sample.tokens, sample.targets, strict=True), key=lambda pair: pair[1])
    for target, pairs in runs:
        said = chat.text([token for token, _ in pairs])
        marked = said if not target or console.color_system else f"{OPENED}{said}{CLOSED}"
        text.append(marked, style=LEARNED if target else "")
    console.print(text, soft_wrap=True)


render = click.Command(
    "render",
    callback=_render,
    params=[
        click.Argument(["file"], metavar="FILE.jsonl", type=click.Path(path_type=Path)),
        click.Option(
            ["--renderer"], type=click.Choice(["harmony", "gemma", "template"]), required=True, help="The chat format."
        ),
        click.Option(["--model"], metavar="DIR", required=True, help="Folder with tokenizer.json, or shipped:tiny."),
        click.Option(["--json", "as_json"], is_flag=True, help="JSON lines with text, tokens and loss_mask."),
        click.Option(
            ["--effort"],
            type=click.Choice(["low", "medium", "high"]),
            default="medium",
            show_default=True,
            help="Harmony: reasoning effort of conversations that name none.",
        ),
        click.Option(["--date"], default="2026-01-01", show_default=True, help="The prompt's date."),
        click.Option(["--knowledge-cutoff"], default="2024-06", show_default=True, help="Harmony: of the model."),
        click.Option(
            ["--identity"], default="You are a helpful assistant.", show_default=True, help="Harmony: first line."
        ),
        click.Option(
            ["--keep-reasoning"],
            is_flag=True,
            help="Gemma: analysis as numbered steps; template: handed to the template. Otherwise it is left out.",
        ),
        click.Option(
            ["--template"],
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="The chat template.  [default: the model folder's]",
        ),
    ],
    help="Show how the conversations of a JSONL file become tokens, with what is learned coloured.",
)
