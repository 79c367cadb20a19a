"""Agent trajectories, preference pairs and the base's language are what they claim to be."""

import itertools
import json
import re

from posttrain.chat.conversation import Conversation, Message
from posttrain.worlds.preferences import KEPT_SHARE, STALLS
from posttrain.worlds.programs import load
from posttrain.worlds.registry import rows


def test_agent_results_are_what_running_the_code_gives() -> None:
    shapes = set()
    for row in rows("agent", "conversations", "train", 400, 1):
        conversation = Conversation.model_validate(row["conversation"])
        shapes.add(tuple(message.recipient or message.role for message in conversation.messages))
        code = test = ""
        for message in conversation.messages:
            found = re.search(r"(def f.*?)\n(assert .*)", message.content, re.DOTALL)
            if found and not code:
                code, test = found.group(1), found.group(2)
            if message.recipient in ("functions.apply_patch", "functions.edit_file"):
                patch = json.loads(message.content)
                assert code.count(patch["old"]) == 1
                code = code.replace(patch["old"], patch["new"])
            if message.role == "tool" and message.content.startswith("test "):
                try:
                    exec(test, {"f": load(code)})
                    verdict = "test passed"
                except (AssertionError, TypeError):
                    verdict = f"test failed: {test}"
                assert message.content == verdict
        assert conversation.messages[-1].channel == "final"
        assert [m.content for m in conversation.messages if m.role == "tool"][-1] == "test passed"
    assert len(shapes) == 3


def test_a_wrong_patch_is_context_and_never_a_target() -> None:
    mistakes = 0
    for row in rows("agent", "conversations", "train", 400, 1):
        messages = row["conversation"]["messages"]
        for message, reply in itertools.pairwise(messages):
            if reply["role"] == "tool" and reply["content"].startswith("test failed"):
                mistakes += 1
                assert message["train"] is False
            elif message["role"] == "assistant":
                assert message["train"] is True
    assert mistakes > 20


def test_a_rejected_answer_is_the_beginning_of_the_chosen_one_and_a_stall() -> None:
    assert not set(STALLS["train"]) & set(STALLS["heldout"])
    for split in ("train", "heldout"):
        for row in rows("preferences", "pairs", split, 300, 1):
            chosen = [Message(**message) for message in row["chosen"]]
            (rejected,) = [Message(**message) for message in row["rejected"]]
            kept, stall = rejected.content.split("... ")
            whole = " ".join(message.content for message in chosen)
            assert whole.startswith(kept) and len(kept) <= max(1, round(KEPT_SHARE * len(whole)))
            assert stall in STALLS[split] and rejected.channel == "final"
            assert chosen[-1].recipient is not None or chosen[-1].channel == "final"


def test_the_language_is_none_of_the_tasks() -> None:
    for row in rows("language", "text", "train", 3000, 1):
        assert not re.search(r"to=functions|namespace functions|apply_patch|\"old\"", row["text"])


def test_asserts_in_the_language_hold() -> None:
    checked = 0
    for row in rows("language", "text", "train", 2000, 1):
        if row["text"].startswith("def f(") and "\nassert" in row["text"]:
            exec(row["text"], {})
            checked += 1
    assert checked > 30
