"""Calculator world: arithmetic too long for the head, and a tool that does it."""

import ast
import operator
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.scoring.calls import final_text, first_call
from posttrain.scoring.numbers import last_number
from posttrain.scoring.score import Score
from posttrain.worlds.answers import answered
from posttrain.worlds.names import Split, split_of

CALCULATE = Tool(
    name="calculate",
    description="value of an expression of numbers, + - * / and brackets",
    parameters={"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)
REQUESTS = ("What is {}?", "Tell me the value of {}.", "Find {}.", "I need the value of {}.")
ANSWERS = ("It is {}.", "The value is {}.", "{}")
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
LONGEST = 200
"""Characters of an expression: without powers, that bounds the time as well."""
LARGEST = 10**30
TOLERANCE = 1e-6


def value(expression: str) -> Fraction:
    """The exact value. ValueError says what is wrong with the expression."""
    if len(expression) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("no expression") from None
    result = _value(tree.body)
    if abs(result) > LARGEST:
        raise ValueError("too large a value")
    return result


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if number in (float("inf"), float("-inf")):
                raise ValueError("too large a number")
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            try:
                return OPERATORS[type(op)](_value(left), _value(right))
            except ZeroDivisionError:
                raise ValueError("division by zero") from None
        case _:
            raise ValueError("only numbers, + - * / and brackets")


def shown(number: Fraction) -> str:
    """Whole where it is whole, else with at most six decimals."""
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.6f}".rstrip("0").rstrip(".")


def _expression(rng: random.Random) -> str:
    text = str(rng.randint(2, 99))
    for _ in range(rng.randint(1, 3)):
        text = f"{text} {rng.choice('+-*')} {rng.randint(2, 99)}"
        if rng.random() < 0.2:
            text = f"({text}) * {rng.randint(2, 9)}"
    return text


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    """One expression in eight is held out."""
    expression = _expression(rng)
    while split_of(expression) != split:
        expression = _expression(rng)
    result = shown(value(expression))
    solution = [
        Message(role="assistant", channel="analysis", content="Use calculate."),
        call("calculate", {"expression": expression}),
        tool_result("calculate", result),
        Message(role="assistant", channel="final", content=rng.choice(ANSWERS).format(result)),
    ]
    return {
        "world": "calculator",
        "prompt": Conversation(
            messages=(Message(role="user", content=rng.choice(REQUESTS).format(expression)),), tools=(CALCULATE,)
        ).model_dump(),
        "reference": {"answer": float(value(expression))},
        "solution": [message.model_dump() for message in solution],
    }


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    return answered(task(rng, split))


class CalculatorEnvironment:
    """Answers every call, faulty ones with what is wrong; a turn without a call ends it.

    Parts: `exact`, the last number of the final message is the value; `format`, every call could be calculated;
    `used`, at least one was made.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.reference = row["reference"]
        self.spoken: list[Message] = []
        self.calculated: list[bool] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        made = first_call(messages)
        if made is None:
            return []
        reply, done = self._answer(made.tool, made.arguments)
        self.calculated.append(done)
        return [tool_result(made.tool, reply)]

    def _answer(self, tool: str, arguments: dict[str, Any] | None) -> tuple[str, bool]:
        if tool != "calculate":
            return "error: no such tool", False
        if arguments is None or set(arguments) != {"expression"} or not isinstance(arguments["expression"], str):
            return "error: give expression", False
        try:
            return shown(value(arguments["expression"])), True
        except ValueError as error:
            return f"error: {error}", False

    def score(self) -> Score:
        number, wanted = last_number(final_text(self.spoken)), self.reference["answer"]
        right = number is not None and abs(number - wanted) <= TOLERANCE * max(1.0, abs(wanted))
        parts = {"exact": float(right), "format": float(all(self.calculated)), "used": float(any(self.calculated))}
        return Score(value=parts["exact"], parts=parts, answer=None if number is None else f"{number:g}")
