"""The tool-call parser reports the same whatever pieces the text comes in, and loses nothing."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.text.tools import CallArguments, CallStart, ToolParser, ToolStyle, collect, parse_answer

CALL = '{"name": "f", "arguments": {"city": "Bern", "n": [1, {"x": "}"}]}}'
# Pieces that meet in all orders: whole calls, broken ones, tags, structure, text.
FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "</tool_call",
    CALL,
    f"<tool_call>\n{CALL}\n</tool_call>",
    f"<tool_call>{CALL}",
    '{"arguments": {"a": "<tool_call>"}, "name": "g"}',
    '{"name": "f", "parameters": {}, "id": 3}',
    '{"name": "f", "arguments": "{\\"a\\": 1}"}',
    '{"name": "f"}',
    '{"name": "</tool_call>", "arguments": {}}',
    '{"type": "function", "function": {"name": "f", "arguments": {}}}',
    '{"name": "f", "arguments": {"q": "a\\"b\\\\"}, "z": {"y": "}"}}',
    '{"name": "f", "arguments": {"open": "never',
    '{"answer": 42}',
    "{", "}", "[", "]", ",", ";", '"', "\\", "<", ">",
    " ", "\n", "\n\n", "\t",
    "text", "Gr\u00fc\u00dfe ", "name",
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
styles = st.sampled_from(list(ToolStyle))
names = st.sampled_from([None, ("f",), ("f", "g")])


def outcome(events):
    """What the events amount to; call ids are random and left out."""
    message = collect(events)
    return message.content, [(call.name, call.arguments) for call in message.calls]


def run_in_pieces(text, cuts, style, tool_names):
    parser = ToolParser(style, tool_names)
    events, start = [], 0
    for cut in [*sorted(cuts), len(text)]:
        events += parser.push(text[start:cut])
        start = cut
    return events + parser.finish()


@settings(max_examples=600, deadline=None)
@given(text=texts, style=styles, tool_names=names, data=st.data())
def test_any_split_gives_the_same_message(text, style, tool_names, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    whole = outcome(run_in_pieces(text, [], style, tool_names))
    assert outcome(run_in_pieces(text, cuts, style, tool_names)) == whole
    assert outcome(run_in_pieces(text, range(len(text)), style, tool_names)) == whole


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet='<>/tool_call{}[]",: \n\\name', max_size=40), style=styles)
def test_text_without_a_call_comes_back_whole(text, style):
    message = parse_answer(text, style)
    if not message.calls:
        assert message.content == text


@settings(max_examples=300, deadline=None)
@given(text=texts, style=styles, data=st.data())
def test_events_are_in_order(text, style, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    started = 0
    for event in run_in_pieces(text, cuts, style, None):
        if isinstance(event, CallStart):
            assert event.index == started
            started += 1
        elif isinstance(event, CallArguments):
            assert event.index == started - 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)

objects = st.dictionaries(st.text(max_size=6), json_values, max_size=3)
written_calls = st.tuples(st.text(min_size=1, max_size=12), objects)


@settings(max_examples=200, deadline=None)
@given(calls=st.lists(written_calls, min_size=1, max_size=3), ascii_only=st.booleans())
def test_well_formed_calls_are_read_back(calls, ascii_only):
    written = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
        for name, arguments in calls
    ]
    hermes = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)
    listed = "[" + ", ".join(written) + "]"
    for text, style in ((hermes, ToolStyle.HERMES), (listed, ToolStyle.JSON)):
        message = parse_answer(text, style)
        assert message.content == ""
        read = [(call.name, json.loads(call.arguments)) for call in message.calls]
        assert read == calls
