"""`commitpackft`: bigcode/commitpackft, a commit's one file before and after, and its message."""

from posttrain.chat.coding_agent import PROMPT
from posttrain.data.formats.format import BadRow, Fields, Format, Record, optional_text, text
from posttrain.data.formats.turns import asked_and_answered

FENCES = {"python": "python", "javascript": "javascript", "go": "go", "rust": "rust", "java": "java"}
FENCES |= {"typescript": "typescript", "c++": "cpp", "c#": "csharp", "shell": "bash"}


def edit(record: Record, instruction: str) -> Fields:
    """The whole file, the change asked for, and the whole file as it is then."""
    old, new = record.get("old_contents"), text(record, "new_contents")
    if not isinstance(old, str):
        raise BadRow("old_contents", "is missing")
    path = optional_text(record, "new_file") or optional_text(record, "old_file")
    language = (optional_text(record, "lang") or "").lower()
    name = f"`{path}`" if path else "this file"
    asked = f"{instruction.strip()}\n\n{_shown(name, old, language)}"
    metadata = {"language": language} if language else {}
    return {"conversation": asked_and_answered(asked, _fenced(new, language), PROMPT, metadata)}


def fields(record: Record) -> Fields:
    return edit(record, optional_text(record, "message") or text(record, "subject"))


def _shown(name: str, old: str, language: str) -> str:
    return f"{name} does not exist yet." if not old.strip() else f"{name} is:\n\n{_fenced(old, language)}"


def _fenced(code: str, language: str) -> str:
    """Between fences that are longer than any run of backticks in the code."""
    fence = "```"
    while fence in code:
        fence += "`"
    end = "" if code.endswith("\n") else "\n"
    return f"{fence}{FENCES.get(language, '')}\n{code}{end}{fence}"


FORMAT = Format(
    columns=("old_contents", "new_contents", "message", "subject"),
    makes={"conversations": fields},
    reads="bigcode/commitpackft, one language's file each",
)
