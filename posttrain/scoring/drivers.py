"""Programs that call into a source tree: they evaluate expressions in its language and hand over the printed values.

An expression of Python may have statements before it, one of Go lines of `import`, each in its own syntax.
They write to descriptor 3, one line each: `value TEXT` or `fault TEXT`, backslash and newline escaped. What a value
should be is never in them.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.errors import ScoringError

Files = Mapping[str, str]
TSC = ("--strict", "--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext", "--skipLibCheck")


@dataclass(frozen=True)
class Driver:
    files: dict[str, str]
    build: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]


def python(tree: Files, expressions: Sequence[str]) -> Driver:
    modules = sorted(name[:-3].replace("/", ".") for name in tree if name.endswith(".py") and "test" not in name)
    modules = [name.removesuffix(".__init__").removeprefix("src.") for name in modules]
    text = f"""\
import ast, importlib, os, sys
sys.path[:0] = [os.getcwd(), os.getcwd() + "/src"]
PLAIN = (int, float, bool, str, bytes, complex, type(None))
def plain(value, depth=0):
    kind = type(value)
    if depth > 20: return False
    if kind in (list, tuple, set, frozenset): return all(plain(one, depth + 1) for one in value)
    if kind is dict: return all(plain(one, depth + 1) for pair in value.items() for one in pair)
    return kind in PLAIN
def say(kind, text):
    data = (kind + " " + text.replace(chr(92), chr(92) * 2).replace(chr(10), chr(92) + "n") + chr(10)).encode()
    while data: data = data[os.write(3, data):]
space = {{}}
for name in {modules!r}:
    module = importlib.import_module(name)
    space[name.split(".")[0]] = sys.modules[name.split(".")[0]]
    space.update((key, value) for key, value in vars(module).items() if not key.startswith("__"))
for expression in {list(expressions)!r}:
    try:
        *before, last = ast.parse(expression).body
        scope = dict(space)
        exec(compile(ast.Module(before, []), "check", "exec"), scope)
        value = eval(compile(ast.Expression(last.value), "check", "eval"), scope)
        say("value", repr(value)) if plain(value) else say("fault", "no plain value")
    except Exception as fault:
        say("fault", type(fault).__name__)
"""
    return Driver({"posttrain_driver.py": text}, (), ("{python}", "-P", "posttrain_driver.py"))


def crate(tree: Files) -> str:
    try:
        return str(tomllib.loads(tree["Cargo.toml"])["package"]["name"]).replace("-", "_")
    except (KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ScoringError(f"the tree's Cargo.toml names no package: {error}") from error


def rust(tree: Files, expressions: Sequence[str]) -> Driver:
    calls = "\n".join(f'    say(|| format!("{{:?}}", {{ {expression} }}));' for expression in expressions)
    text = f"""\
#![allow(unused_imports)]
use {crate(tree)}::*;
use std::io::Write;
use std::os::unix::io::FromRawFd;
fn say<F: FnOnce() -> String + std::panic::UnwindSafe>(call: F) {{
    let (kind, text) = match std::panic::catch_unwind(call) {{
        Ok(text) => ("value", text),
        Err(_) => ("fault", String::from("panic")),
    }};
    let text = text.replace('\\\\', "\\\\\\\\").replace('\\n', "\\\\n");
    let mut file = std::mem::ManuallyDrop::new(unsafe {{ std::fs::File::from_raw_fd(3) }});
    file.write_all(format!("{{}} {{}}\\n", kind, text).as_bytes()).unwrap();
}}
fn main() {{
{calls}
}}
"""
    build = (("cargo", "build", "--offline", "-q", "--example", "posttrain_driver"),)
    return Driver({"examples/posttrain_driver.rs": text}, build, ("{work}/target/debug/examples/posttrain_driver",))


def go_module(tree: Files) -> str:
    found = re.search(r"^module\s+(\S+)", tree.get("go.mod", ""), re.MULTILINE)
    if found is None:
        raise ScoringError("the tree's go.mod names no module")
    return found.group(1)


def go(tree: Files, expressions: Sequence[str]) -> Driver:
    module, files = go_module(tree), {}
    for number, expression in enumerate(expressions):
        imports, body = _go_imports(expression)
        lines = imports or [f'import . "{module}"']
        text = "\n".join(["package main", "", *lines, "", f"func check{number}() any {{ return {body} }}", ""])
        files[f"posttrain_driver/check{number}.go"] = text
    calls = "\n".join(f"\tsay(check{number})" for number in range(len(expressions)))
    files["posttrain_driver/main.go"] = f"""\
package main

import (
\t"fmt"
\t"os"
\t"strings"
)

func say(call func() any) {{
\tkind, text := "fault", "panic"
\tdefer func() {{
\t\trecover()
\t\ttext = strings.ReplaceAll(strings.ReplaceAll(text, "\\\\", "\\\\\\\\"), "\\n", "\\\\n")
\t\tfmt.Fprintf(os.NewFile(3, "answers"), "%s %s\\n", kind, text)
\t}}()
\tvalue := fmt.Sprintf("%#v", call())
\tkind, text = "value", value
}}

func main() {{
{calls}
}}
"""
    build = (("go", "build", "-o", "{work}/posttrain_driver.out", "./posttrain_driver"),)
    return Driver(files, build, ("{work}/posttrain_driver.out",))


def _go_imports(expression: str) -> tuple[list[str], str]:
    """The lines of `import` that an expression begins with, and the rest."""
    lines = expression.split("\n")
    first = next((place for place, line in enumerate(lines) if not line.startswith("import ")), len(lines))
    return lines[:first], "\n".join(lines[first:])


def typescript(tree: Files, expressions: Sequence[str]) -> Driver:
    sources = sorted(name for name in tree if name.endswith(".ts") and "test" not in name and ".d." not in name)
    imports = "\n".join(
        f"Object.assign(space, await import({json.dumps('./.built/' + name[:-3] + '.js')}));" for name in sources
    )
    text = f"""\
import fs from "node:fs";
const space = {{}};
{imports}
const say = (kind, text) =>
  fs.writeSync(3, kind + " " + String(text).replaceAll("\\\\", "\\\\\\\\").replaceAll("\\n", "\\\\n") + "\\n");
for (const expression of {json.dumps(list(expressions))}) {{
  try {{
    const value = new Function(...Object.keys(space), "return (" + expression + ")")(...Object.values(space));
    say("value", JSON.stringify(value));
  }} catch (fault) {{
    say("fault", fault?.name);
  }}
}}
"""
    build = (("{node}", "{modules}/typescript/bin/tsc", *TSC, "--rootDir", ".", "--outDir", ".built", *sources),)
    return Driver({"posttrain_driver.mjs": text}, build, ("{node}", "posttrain_driver.mjs"))
