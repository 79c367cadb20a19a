"""Questions with one right answer: the final message is compared, nothing else is read."""

from typing import Any

from posttrain.chat.conversation import Message
from posttrain.scoring.calls import final_text
from posttrain.scoring.numbers import marked_number
from posttrain.scoring.score import Score


class AnswerEnvironment:
    """One turn. The reference's `kind` is `exact`, `number` (behind `####`, within `tolerance`) or `choice`."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.reference = row["reference"]
        self.spoken: list[Message] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        return []

    def score(self) -> Score:
        said, wanted = final_text(self.spoken).strip(), self.reference.get("answer")
        if wanted is None:
            return Score(value=None, reason="the task has no reference answer")
        match self.reference.get("kind"):
            case "number":
                number = marked_number(said)
                formed = number is not None
                right = number is not None and abs(number - wanted) <= self.reference["tolerance"]
            case "choice":
                letter = said.rstrip(".").strip("()")
                formed = letter in self.reference["choices"]
                right = letter == wanted
            case _:
                formed = bool(said)
                right = said == wanted.strip()
        parts = {"format": float(formed), "exact": float(right)}
        return Score(value=parts["exact"], parts=parts)
