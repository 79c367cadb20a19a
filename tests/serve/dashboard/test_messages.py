"""Transcripts as messages: who speaks, in which channel; what is no message stays as it is."""

from posttrain.serve.dashboard.messages import Shown, split


def test_harmony_is_told_apart_by_channel():
    text = (
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>commentary to=functions.sum"
        '<|constrain|>json<|message|>{"a": 1}<|call|>'
        "<|start|>functions.sum to=assistant<|channel|>commentary<|message|>2"
        "<|end|><|start|>assistant<|channel|>final<|message|>2 < 3<|return|>"
    )
    assert split(text, "assistant") == [
        Shown("assistant analysis", "analysis", "Add."),
        Shown("assistant commentary to=functions.sum", "commentary", '{"a": 1}'),
        Shown("functions.sum to=assistant commentary", "commentary", "2"),
        Shown("assistant final", "final", "2 < 3"),
    ]


def test_a_prompt_names_its_speakers():
    text = "<|start|>system<|message|>S<|end|><|start|>user<|message|>U<|end|><|start|>assistant"
    assert split(text) == [Shown("system", "system", "S"), Shown("user", "user", "U"), Shown("", "text", "assistant")]


def test_gemma_and_text_of_no_format():
    text = "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert split(text) == [Shown("user", "user", "Hello"), Shown("model", "model", "")]
    assert split("Hi<end_of_turn>", "model") == [Shown("model", "model", "Hi")]
    assert split("no <b>format</b>", "assistant") == [Shown("assistant", "assistant", "no <b>format</b>")]
    assert split("<|channel|>analysis<|message|>") == [Shown("analysis", "analysis", "")]
