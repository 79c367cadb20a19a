"""Signatures worked by hand; `test_official` compares hundreds more with the library."""

from typing import Any

import pytest

from posttrain.chat.conversation import Tool
from posttrain.chat.typescript import namespace, type_of


def test_a_namespace_in_full() -> None:
    search = Tool(
        name="search",
        description="Finds things.\nSlowly.",
        parameters={
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "What to find"},
                "kind": {"type": "string", "enum": ["book", "film"], "default": "book"},
                "limit": {"type": "integer", "default": 10, "nullable": True},
                "where": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
                "tags": {"type": "array", "items": {"type": "string"}},
                "id": {"oneOf": [{"type": "string"}, {"type": "integer", "description": "old"}], "description": "Key"},
            },
            "required": ["query"],
        },
    )
    stop = Tool(name="stop", description="", parameters={"type": "object", "properties": {}})
    assert (
        namespace("functions", [search, stop])
        == """## functions

namespace functions {

// Finds things.
// Slowly.
type search = (_: {
// What to find
query: string,
kind?: "book" | "film", // default: book
limit?: number | null, // default: 10
where?: {
    x: number,
    },
tags?: string[],
// Key
id?:
 | string
 | number // old
,
}) => any;

type stop = (_: {
}) => any;

} // namespace functions"""
    )


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({}, "any"),
        ({"anyOf": [{"type": "string"}]}, "any"),
        ({"type": ["integer", "null"]}, "number | null"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}, "boolean[][]"),
        (True, "any"),
    ],
)
def test_types(schema: Any, written: str) -> None:
    assert type_of(schema, "") == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1.0, "1.0"),
        (1e-5, "0.00001"),
        (-2.5e-5, "-0.000025"),
        (1e-7, "1e-7"),
        (1.5e16, "1.5e16"),
        (2**70, "1.1805916207174113e21"),
        ({"ü": [1, "a\n"]}, '{"ü":[1,"a\\n"]}'),
        (None, "null"),
        ("x", '"x"'),
    ],
)
def test_defaults_are_written_as_serde_json_does(value: Any, written: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number", "default": value}}}
    assert type_of(schema, "") == f"{{\nn?: number, // default: {written}\n}}"
