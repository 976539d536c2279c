"""The tool-call parser on answers as models write them."""

from __future__ import annotations

import json
import re

import pytest

from sterna.text.tools import (
    CallArguments,
    CallStart,
    ContentText,
    ToolParser,
    ToolStyle,
    detect_style,
    parse_answer,
)

F = '{"name": "f", "arguments": {}}'
G = '{"name": "g", "arguments": {}}'


def calls_of(text, style=ToolStyle.HERMES, names=None):
    message = parse_answer(text, style, names)
    return message.content, [(call.name, call.arguments) for call in message.calls]


def test_hermes_call_with_content_around():
    text = 'Let me look.\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    assert calls_of(text) == ("Let me look.", [("f", '{"a": 1}')])
    assert calls_of(text + "Done.") == ("Let me look.\nDone.", [("f", '{"a": 1}')])


def test_hermes_two_calls():
    one = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    two = one.replace('"f"', '"g"')
    assert calls_of(f"{one}\n{two}") == ("", [("f", "{}"), ("g", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "<tool_call> is a tag",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call> and on',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        "<tool_call>{not json}</tool_call>",
        "<tool_call>",
        "<tool_c",
        "trailing space \n",
        '{"name": "f", "arguments": {}}',
    ],
)
def test_hermes_malformed_calls_are_content(text):
    assert calls_of(text) == (text, [])


def test_hermes_doubled_tag_and_missing_close():
    text = '<tool_call><tool_call>{"name": "f", "arguments": {}}'
    assert calls_of(text) == ("<tool_call>", [("f", "{}")])


def test_cut_off_arguments_are_kept():
    text = '<tool_call>{"name": "f", "arguments": {"a": "unfin'
    assert calls_of(text) == ("", [("f", '{"a": "unfin')])


def test_arguments_stream_as_they_come():
    parser = ToolParser(ToolStyle.HERMES)
    assert parser.push('Hi <tool_call>{"name": "f", "argu') == [ContentText("Hi")]
    start, first = parser.push('ments": {"a": ')
    assert isinstance(start, CallStart)
    assert (start.index, start.name) == (0, "f")
    assert re.fullmatch(r"call_[0-9a-f]{24}", start.id)
    assert first == CallArguments(0, '{"a": ')
    assert parser.push('"x}"') == [CallArguments(0, '"x}"')]
    assert parser.push("}}</tool") == [CallArguments(0, "}")]
    assert parser.push("_call>") == []
    assert parser.finish() == []


def test_partial_tag_is_held_back_until_it_is_none():
    parser = ToolParser(ToolStyle.HERMES)
    assert parser.push("a <tool") == [ContentText("a")]
    assert parser.push("box>") == [ContentText(" <toolbox>")]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        (f"[{F}, {G}]", [("f", "{}"), ("g", "{}")]),
        (f"{F}; {G}", [("f", "{}"), ("g", "{}")]),
        (f"{F}\n{G}", [("f", "{}"), ("g", "{}")]),
        (' {"arguments": {"b": 2}, "name": "f"} ', [("f", '{"b": 2}')]),
        ('{"name": "f", "arguments": {}, "id": {"x": "}"}}', [("f", "{}")]),
        ('[{"name": "f", "arguments": {}},', [("f", "{}")]),
    ],
)  # fmt: skip
def test_json_style(text, calls):
    assert calls_of(text, ToolStyle.JSON, ("f", "g")) == ("", calls)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Bob", "arguments": {}}',
        '{"answer": 1}',
        "[1, 2]",
        "[]",
        "{",
        "  ",
        "plain {text}",
    ],
)
def test_json_that_is_no_call_is_content(text):
    assert calls_of(text, ToolStyle.JSON, ("f",)) == (text, [])


def test_json_answer_that_is_no_call_streams():
    parser = ToolParser(ToolStyle.JSON, ("f",))
    assert parser.push('{"answer"') == [ContentText('{"answer"')]
    assert parser.push(": 1") == [ContentText(": 1")]


def test_json_list_with_a_stranger_keeps_it():
    text = '[{"name": "f", "arguments": {}}, {"name": "who", "arguments": {}}]'
    content, calls = calls_of(text, ToolStyle.JSON, ("f",))
    assert calls == [("f", "{}")]
    assert content == ', {"name": "who", "arguments": {}}]'


def test_deep_nesting_is_content_not_a_crash():
    text = '<tool_call>{"id": ' + "[" * 100_000 + "</tool_call>"
    assert calls_of(text) == (text, [])


def test_lone_surrogates_never_come_out():
    bad = '{"arguments": {"a": "\\ud800"}, "name": "f"}'
    assert calls_of(bad, ToolStyle.JSON) == ("", [("f", '{"a": "\\ud800"}')])
    text = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
    assert calls_of(text) == (text, [])


def test_escaped_names_are_decoded():
    name = 'f"\u00e9'
    text = "<tool_call>" + json.dumps({"name": name, "arguments": {}}) + "</tool_call>"
    assert calls_of(text) == ("", [(name, "{}")])


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (None, ToolStyle.HERMES),
        ("{{ messages }}", ToolStyle.HERMES),
        ("{% if tools %}<tool_call>{% endif %}", ToolStyle.HERMES),
        ('{% if tools %}{"name": 1, "parameters": 2}{% endif %}', ToolStyle.JSON),
    ],
)
def test_detect_style(template, style):
    assert detect_style(template) is style
