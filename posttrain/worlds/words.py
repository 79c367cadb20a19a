"""Words world: the words and signs that the other worlds' tasks are written in, in no order, to be copied.

It teaches the base to tell these tokens apart. A token that training never shows keeps an output row like that of every
other such token, and an adapter, which cannot change the output head, would spread its choice over all of them.
"""

import random
from typing import Any

from posttrain.worlds.language import STOCK, scrambled
from posttrain.worlds.names import Split

HARMONY = (
    *("functions", " functions", "commentary", " commentary", "json", " to=", " tools", " Tools", "## ", "# "),
    *(
        "namespace",
        " namespace",
        "type ",
        " => any;",
        " (_: {\n",
        "})",
        ": string",
        ": number",
        ",\n",
        "// ",
        " //",
        ";\n\n",
        " {\n\n",
        ".\n\n",
    ),
    *("Calls", " channel", " these", " must", " go", "analysis", "final", "assistant", "user", "developer", "system"),
)
CODING = (
    *("patch", "apply", " apply", "old", "new", " old", " new", "edit", " edit", "read", " read", "run", " run"),
    *("path", ".py", "file", " file", "test", " test", "tests", " tests", " passed", " failed", " passes", " fails"),
    *(" fail", " wrong", " body", " missing", " arithmetic", " constant", " boundary", " negated", " condition"),
    *(" operator", " value", " boolean", " assert", " replace", " then", " show", " time", "pass", "Fix", "Fixed"),
    *("error", " found", " times", "Not", " yet", "Make", "Done", "Please", "This", "()", "{}", "))", "']", " -= "),
)
TALK = (
    *(
        "Use",
        "A",
        "ready",
        " one",
        " tool",
        "Be",
        " brief",
        "Ready",
        "Today",
        "Can",
        "Could",
        "Hello",
        "About",
        "We",
        "My",
        "The",
    ),
    *(" The", "It", " is", " it", " we", " you", " your", " need", " want", " please", " thanks", " now", " them"),
    *(" task", " id", " status", " ok", " done", "I", " have", " to", " will", " later", " soon", "..."),
)
WORDS = (*HARMONY, *CODING, *TALK)
"""As they stand in the other worlds' texts, with the space or sign they follow."""


def document(rng: random.Random, split: Split) -> dict[str, Any]:
    return {"text": scrambled(rng, split, (*WORDS, *WORDS, *STOCK))}
