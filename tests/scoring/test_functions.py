"""Grading by values: plain values out, limits kept, and nothing a program does becomes a pass, at every level."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.sandbox.calls import Caller
from posttrain.sandbox.confine import LADDER
from posttrain.scoring.functions import Grade, judge
from tests.sandbox.abuse import HACKS
from tests.sandbox.levels import EVERY, need

TESTS = [[[3], 4], [[5], 6]]
HIDDEN = [[[3], 91577519], [[5], [91577519]]]
"""Values that no program can know."""
RIGHT = "def f(a):\n    return a + 1\n"


@pytest.fixture(scope="module", params=LADDER)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Caller]:
    with Caller(need(request.param)) as made:
        yield made


def grade(sandbox: Caller, source: str, tests: list[list[object]]) -> Grade:
    return judge(sandbox, source, tests)


def test_right_and_half_right_programs(sandbox: Caller) -> None:
    assert grade(sandbox, RIGHT, TESTS).passed == (True, True)
    assert grade(sandbox, "def f(a):\n    return 4\n", TESTS).passed == (True, False)


@pytest.mark.parametrize(
    ("value", "expected", "passes"),
    [
        ("1", 1, True),
        ("True", 1, False),
        ("1.0", 1, False),
        ("1", True, False),
        ("'x'", "x", True),
        ("[1, 'a', None]", [1, "a", None], True),
        ("(1, 2)", [1, 2], False),
        ("float('nan')", 1.0, False),
        ("type('E', (), {'__eq__': lambda s, o: True, '__repr__': lambda s: '1'})()", 1, False),
        ("type('I', (int,), {'__repr__': lambda s: '1'})(2)", 1, False),
    ],
)
def test_values_are_compared_by_type_and_value(sandbox: Caller, value: str, expected: object, passes: bool) -> None:
    assert grade(sandbox, f"def f():\n    return {value}\n", [[[], expected]]).passed == (passes,)


HOSTILE = {
    "no function": "x = 1",
    "syntax": "def f(a) return a",
    "loop": "def f(a):\n    while True: pass",
    "loop that catches": "def f(a):\n    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "comprehension": "def f(a):\n    return [x for x in range(10**12)]",
    "loop in C": "def f(a):\n    return sum(range(10**12))",
    "recursion": "def f(a):\n    return f(a)",
    "memory": "def f(a):\n    return [0] * 10**10",
    "big number": "def f(a):\n    return 10 ** 10000",
    "long value": "def f(a):\n    return 'x' * 10**6",
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit at end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(a): raise SystemExit",
    "verdict on stdout": 'print(\'{"values": [["value", "4"], ["value", "6"]]}\')\ndef f(a): return 0',
    "verdict on every descriptor": "import os\nfor n in range(64):\n    try: os.write(n, b'{\"values\": []}\\n')\n"
    "    except OSError: pass\ndef f(a): return 0",
    "process": "import os\ndef f(a): return os.fork() * 0 + a + 1",
    "thread": "import threading\ndef f(a):\n    threading.Thread(target=print).start()\n    return a + 1",
    "kill all": "import os\ndef f(a): os.kill(-1, 9)",
    "segfault": "import ctypes\ndef f(a): ctypes.string_at(0)",
    "stop itself": "import os, signal\ndef f(a): os.kill(os.getpid(), signal.SIGSEGV)",
    "writes": "def f(a):\n    open('left', 'w').write('x')\n    return a + 1",
}


# None only where a starved machine lets the wall clock run out before two seconds of CPU are had.
@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_programs_fail_and_the_next_is_graded(sandbox: Caller, name: str) -> None:
    assert grade(sandbox, HOSTILE[name], TESTS).passed in ((False, False), None)
    assert grade(sandbox, RIGHT.replace("a + 1", f"a + 1  # {name}"), TESTS).passed == (True, True)


@pytest.mark.parametrize("name", sorted(HACKS))
def test_a_hack_earns_nothing(sandbox: Caller, name: str) -> None:
    assert grade(sandbox, HACKS[name], TESTS).passed in ((False, False), None)
    assert grade(sandbox, HACKS[name], HIDDEN).passed in ((False, False), None)
    assert grade(sandbox, RIGHT, TESTS).passed == (True, True)


def test_two_hundred_honest_programs_pass(sandbox: Caller) -> None:
    for n in range(200):
        source = f"import math\ndef f(a):\n    return [math.gcd(a, {n}), str(a), {{a: {n}}}]\n"
        assert grade(sandbox, source, [[[6], [math.gcd(6, n), "6", {6: n}]]]).passed == (True,)


def test_steps_are_counted_not_timed(sandbox: Caller) -> None:
    program = "def f(a):\n    n = 0\n    while True: n += 1\n"
    assert grade(sandbox, program, [[[1], 1]]).reason == "it takes too many steps"
    # Under the count, and a hundred times what a small function needs.
    assert grade(sandbox, "def f(a):\n    n = 0\n    for i in range(5000): n += 1\n    return n", [[[1], 5000]]).passed


@EVERY
def test_the_environment_is_clean_and_the_folder_empty(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_TEST_SECRET", "s3cret")
    program = (
        "import os\ndef open_ones():\n    for n in range(64):\n        try: os.fstat(n)\n"
        "        except OSError: continue\n        yield n\n"
        "def f():\n    return [sorted(os.environ), os.listdir('.'), list(open_ones())]"
    )
    with Caller(need(level)) as fresh:
        kind, text = fresh.run(program, [[]])["values"][0]
    assert kind == "value"
    names, files, descriptors = eval(text)
    assert set(names) <= {"PYTHONHASHSEED", "LC_CTYPE", "LD_LIBRARY_PATH"} and files == []
    assert descriptors == [0, 1, 2, 3]  # null three times, and the answer's pipe


def test_sets_are_walked_in_one_order() -> None:
    program = "def f():\n    return list({'kelmo', 'velka', 'brim', 'sarel', 'vantu'})"
    orders = set()
    for _ in range(3):
        with Caller() as fresh:
            orders.add(str(fresh.run(program, [[]])["values"]))
    assert len(orders) == 1


@EVERY
def test_a_killed_worker_is_started_again(level: str) -> None:
    with Caller(need(level)) as sandbox:
        assert grade(sandbox, RIGHT, TESTS).passed == (True, True)
        assert sandbox.slot.pid is not None
        os.kill(sandbox.slot.pid, signal.SIGKILL)
        time.sleep(0.05)
        assert grade(sandbox, RIGHT + "\n", TESTS).passed == (True, True)


def test_a_sandbox_that_cannot_start_leaves_the_program_unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with Caller("off") as sandbox:
        verdict = grade(sandbox, RIGHT, TESTS)
    assert verdict.passed is None and verdict.reason is not None and "cannot start" in verdict.reason


SCRIPT = """
import os, signal
from posttrain.sandbox.calls import shared
from posttrain.scoring.functions import grade
grade('def f(): return 1', [[[], 1]])
print(shared().slot.pid, shared().slot.stage, flush=True)
"""


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["ends", "is killed"])
def test_no_process_and_no_folder_outlive_the_parent(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT + end], capture_output=True, text=True, check=False)
    pid, folder = done.stdout.split()
    worker = Path(f"/proc/{pid}")
    for _ in range(500):
        if not Path(folder).exists() and (not worker.exists() or "(zombie)" in (worker / "status").read_text()):
            return
        time.sleep(0.02)
    raise AssertionError(f"left: {worker} {worker.exists()}, {folder} {Path(folder).exists()}")
