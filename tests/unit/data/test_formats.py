"""Rows of the five formats, and what is said about those that are none."""

from __future__ import annotations

import pytest

from sterna.core.errors import RowError
from sterna.data.config import SourceConfig
from sterna.data.formats import Conversation, Plain, detect_format, read_row


def read(row, format, as_chat=True, **options):
    return read_row(row, format, SourceConfig(path="x", **options), as_chat)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [], "id": 1}, "chat"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"instruction": "", "input": "", "output": ""}, "alpaca"),
        ({"text": "", "url": ""}, "text"),
    ],
)
def test_detection(row, format):
    assert detect_format([row, row], {}) == format


def test_detection_by_mapped_fields_and_refusals():
    assert detect_format([{"q": 1, "a": 2}], {"prompt": "q", "completion": "a"}) == (
        "prompt_completion"
    )
    with pytest.raises(RowError, match=r"keys a, q fit no format .*`fields`"):
        detect_format([{"q": 1, "a": 2}], {})
    with pytest.raises(RowError, match="no row"):
        detect_format([], {})
    with pytest.raises(RowError):  # the second row has other keys
        detect_format([{"text": ""}, {"messages": []}], {})


def test_chat_with_tools_as_text_and_a_default_system():
    row = {"messages": [turn("user", "a"), turn("assistant", "b")], "tools": '[{"type": "x"}]'}
    sample = read(row, "chat", system="S")
    assert sample == Conversation([turn("system", "S"), *row["messages"]], [{"type": "x"}])
    own = {"messages": [turn("system", "own"), turn("assistant", "b")]}
    assert read(own, "chat", system="S").messages[0]["content"] == "own"


def test_pairs():
    row = {"prompt": "p", "completion": "c"}
    chat = [turn("user", "p"), turn("assistant", "c")]
    assert read(row, "prompt_completion").messages == chat
    assert read(row, "prompt_completion", as_chat=False) == Plain("p", "c")
    assert read(row, "prompt_completion", as_chat=False, system="S") == Plain("S\n\np", "c")
    spoken = {"prompt": [turn("user", "p"), turn("assistant", "old"), turn("user", "q")],
              "completion": [turn("assistant", "c")]}  # fmt: skip
    messages = read(spoken, "prompt_completion").messages
    assert [m.get("train", True) for m in messages] == [False, False, False, True]


def test_alpaca_and_nested_fields():
    row = {"instruction": "i", "input": "", "output": "o"}
    assert read(row, "alpaca").messages == [turn("user", "i"), turn("assistant", "o")]
    assert read({**row, "input": "x"}, "alpaca").messages[0]["content"] == "i\n\nx"
    assert read(row, "alpaca", as_chat=False) == Plain("i\n\n", "o")
    seed = {"instruction": "i", "instances": [{"input": "x", "output": "o"}]}
    fields = {"input": "instances.0.input", "output": "instances.0.output"}
    assert read(seed, "alpaca", fields=fields).messages[1]["content"] == "o"


def test_sharegpt_with_calls():
    row = {"system": "S", "conversations": [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It rains", "weight": 0},
    ]}  # fmt: skip
    messages = read(row, "sharegpt").messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert messages[4]["weight"] == 0


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ([1], "text", "is a list"),
        ({"text": 3}, "text", "text is a int"),
        ({"text": "  "}, "text", "text is empty"),
        ({}, "text", "text is missing"),
        ({"prompt": "p", "completion": ""}, "prompt_completion", "completion is empty"),
        ({"prompt": "p"}, "prompt_completion", "completion is missing"),
        ({"instruction": "i"}, "alpaca", "output is missing"),
        ({"messages": "hi"}, "chat", "messages is text but no JSON"),
        ({"messages": []}, "chat", "messages is empty"),
        ({"messages": [1]}, "chat", "no list of objects"),
        ({"messages": [turn("user", "a")]}, "chat", "no message has the role assistant"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "from is 'alien'"),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "value is a NoneType"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "sharegpt", "no JSON"),
    ],
)
def test_malformed_rows_name_the_fault(row, format, reason):
    with pytest.raises(RowError, match=reason):
        read(row, format)


def test_unknown_field_names_are_refused():
    with pytest.raises(ValueError, match="unknown field 'promt' of format prompt_completion"):
        SourceConfig(path="x", format="prompt_completion", fields={"promt": "q"})
