"""Calls are read out of messages and compared as JSON values."""

from posttrain.chat.conversation import Message, call, tool_result
from posttrain.scoring.calls import ToolCall, final_text, first_call


def test_the_first_call_of_several_counts() -> None:
    thought = Message(role="assistant", channel="analysis", content="functions.x")
    found = first_call([thought, call("send_kelmo", {"count": 3}), call("other", {})])
    assert found == ToolCall("send_kelmo", {"count": 3})
    assert first_call([thought, tool_result("send_kelmo", "{}")]) is None


def test_arguments_are_equal_as_json() -> None:
    made = ToolCall("t", {"a": 1, "b": {"c": [1, True, None]}})
    assert made.matches_arguments({"b": {"c": [1, True, None]}, "a": 1})
    assert not made.matches_arguments({"b": {"c": [True, True, None]}, "a": 1})
    assert not made.matches_arguments({"b": {"c": [1, True, None]}, "a": 1.0})
    assert not ToolCall("t", None).matches_arguments({})
    assert ToolCall("t", {}).matches_arguments({})


def test_the_last_final_is_the_answer() -> None:
    def said(channel: str, text: str) -> Message:
        return Message.model_validate({"role": "assistant", "channel": channel, "content": text})

    assert final_text([said("final", "one"), said("analysis", "two"), said("final", "three")]) == "three"
    assert final_text([said("analysis", "two")]) == ""
