"""Tools in their processes, and the two ways of calling them."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tests.unit.align.runs import recipe, tiny

from sterna.align.config import RolloutSection
from sterna.align.draw import make_toolbox, speaks_chat
from sterna.align.hybrid import Sampling
from sterna.align.prompts import PromptStream, that_fit
from sterna.align.rollout import Rollout
from sterna.align.tools.protocol import ChatProtocol, PlainProtocol, cut
from sterna.align.tools.toolbox import Toolbox, ToolRequest, ToolResult
from sterna.align.tools.turns import ToolTurns
from sterna.core.errors import ConfigError
from sterna.text.tokenizer import load_tokenizer

TOOLS = '''
import os, time
from typing import Literal

def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Not told: details.
    """
    print("tools may print")
    return a + b

def shout(text: str, ends: list[str] = [], how: Literal["a", "b"] = "a", x: float | None = None):
    return {"said": text.upper()}

def fail(text):
    raise KeyError("no such thing")

def hang(text):
    while True:
        pass

def leave(text):
    os._exit(3)
'''


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    file = tmp_path_factory.mktemp("tools") / "mine.py"
    file.write_text(TOOLS)
    return [f"{file}:{name}" for name in ("add", "shout", "fail", "hang", "leave")]


@pytest.fixture(scope="module")
def toolbox(places):
    box = Toolbox(places, timeout_s=0.5)
    yield box
    box.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder)


def test_schemas_come_from_annotations(toolbox):
    add, shout = (schema["function"] for schema in toolbox.schemas[:2])
    assert add == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a"],
        },
    }
    assert shout["parameters"]["properties"] == {
        "text": {"type": "string"},
        "ends": {"type": "array", "items": {"type": "string"}},
        "how": {"enum": ["a", "b"]},
        "x": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    }


def test_results_and_errors_are_texts_in_order(toolbox):
    calls = [
        ToolRequest("add", {"a": 2, "b": 3}),
        ToolRequest("shout", "hey"),
        ToolRequest("fail", "x"),
        ToolRequest("add", {"c": 1}),
        ToolRequest("sub", {}),
        ToolRequest("add", None),
    ]
    found = toolbox.run(calls)
    assert [result.text for result in found[:2]] == ["5", '{"said": "HEY"}']
    assert [result.is_error for result in found] == [False, False, True, True, True, True]
    assert found[2].text == "error: KeyError: 'no such thing'"
    assert "unexpected keyword argument 'c'" in found[3].text
    assert "there are: add, shout" in found[4].text


def test_a_tool_that_hangs_or_exits_is_an_answer_too(toolbox):
    started = time.monotonic()
    found = toolbox.run([ToolRequest("hang", "x"), ToolRequest("leave", "x")])
    assert found[0].text == "error: hang took more than 0.5 s"
    assert found[1].text == "error: leave ended its process (exit status 3)"
    assert time.monotonic() - started < 20
    assert toolbox.run([ToolRequest("add", {"a": i}) for i in range(4)])[3].text == "4"


@pytest.mark.parametrize(
    ("bad", "why"),
    [("gone.py:f", "no Python file"), ("f", "file.py:name"), (":g", "no function g")],
)
def test_what_cannot_be_loaded_is_refused(places, bad, why):
    file = places[0].rpartition(":")[0]
    with pytest.raises(ConfigError, match=why):
        Toolbox([file + bad if bad == ":g" else bad], 1.0)
    with pytest.raises(ConfigError, match="twice"):
        Toolbox([places[0], places[0]], 1.0)


def test_the_chat_protocol_is_the_templates(tokenizer):
    protocol = ChatProtocol(tokenizer, ["add"], 50)
    text = 'x <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    (call,) = protocol.calls(text)
    assert (call.name, call.arguments) == ("add", {"a": 1})
    assert protocol.calls("no call") == []
    (bad,) = protocol.calls('<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>')
    assert bad.arguments is None
    end = tokenizer.eos_token_ids[0]
    behind = tokenizer.decode(protocol.reply([call], [ToolResult("5")], end), False)
    assert behind == ("<|user|><tool_response>\n5\n</tool_response><|end|><|assistant|>")
    # A turn that ended in a stop string gets its end token first.
    unended = tokenizer.decode(protocol.reply([call], [ToolResult("5")], 65), False)
    assert unended == "<|end|>" + behind


def test_the_plain_protocol_reads_the_last_call(tokenizer):
    protocol = PlainProtocol(tokenizer, 50)
    (call,) = protocol.calls("so <call>add 3 4</call>")
    assert (call.name, call.arguments) == ("add", "3 4")
    assert protocol.calls("<call>add 3 4") == []
    reply = tokenizer.decode(protocol.reply([call], [ToolResult("7")], 65), False)
    assert reply == "<result>7</result>"
    assert cut("abcdef", tokenizer, 3) == "abc [cut]"


class Scripted:
    """An engine that writes given turns; a turn cut by its limit is truncated."""

    version = 0

    def __init__(self, tokenizer, turns, max_model_len=1000):
        self._tokenizer = tokenizer
        self._turns = iter(turns)
        self.max_model_len = max_model_len
        self.prompts = []

    def generate(self, prompts, group_size, sampling, seeds, limits=None):
        found = []
        for i, prompt in enumerate(prompts):
            for j in range(group_size):
                self.prompts.append(list(prompt))
                tokens = self._tokenizer.encode(next(self._turns), add_special_tokens=False)
                most = limits[i] if limits else sampling.max_tokens
                found.append(
                    Rollout(
                        prompt_idx=i, sample_idx=j, prompt=np.array(prompt, np.int32),
                        completion=np.array(tokens[:most], np.int32),
                        mask=np.ones(len(tokens[:most]), np.bool_),
                        logprobs=np.full(len(tokens[:most]), -0.5, np.float32),
                        policy_version=0, is_truncated=len(tokens) > most,
                    )
                )  # fmt: skip
        return found


def play(tokenizer, toolbox, turns, max_tokens=200, max_turns=3, **limits):
    engine = Scripted(tokenizer, turns, **limits)
    protocol = PlainProtocol(tokenizer, 20)
    play = ToolTurns(engine, tokenizer, toolbox, protocol, max_turns)
    return engine, play.generate([[1, 2, 3]], 2, Sampling(max_tokens=max_tokens), [7])


def test_turns_are_appended_token_by_token(tokenizer, toolbox):
    turns = ["<call>shout a</call>", "no", "<call>fail</call>", "end<|end|>"]
    engine, (one, other) = play(tokenizer, toolbox, turns)
    text = tokenizer.decode(one.completion.tolist(), False)
    assert text.startswith('<call>shout a</call><result>{"said": "A"}</result><call>fail</call>')
    assert text.endswith("</result>end<|end|>")
    assert (one.tool_calls, one.tool_errors, one.is_truncated) == (2, 1, False)
    written = [tokenizer.decode(one.completion[a:b].tolist(), False) for a, b in one.turns()]
    assert written == [turns[0], turns[2], turns[3]]
    assert one.logprobs.tolist() == np.where(one.mask, np.float32(-0.5), 0).tolist()
    # Every turn's prompt is all that was there before it, token by token.
    for prompt, (begin, _) in zip(engine.prompts[2:], one.turns()[1:], strict=True):
        assert prompt == [1, 2, 3, *one.completion[:begin].tolist()]
    assert other.mask.all()
    assert [(r.prompt_idx, r.sample_idx) for r in (one, other)] == [(0, 0), (0, 1)]


def test_limits_end_a_completion_as_truncated(tokenizer, toolbox):
    call = "<call>shout a</call>"  # 20 tokens; its answer takes 30
    _, (last, done) = play(tokenizer, toolbox, [call, "no"], max_turns=1)
    assert (last.is_truncated, last.tool_calls, done.is_truncated) == (True, 0, False)
    _, (full, _) = play(tokenizer, toolbox, [call, "no"], max_tokens=50)
    assert full.is_truncated
    assert full.mask.all()
    _, (fits, _) = play(tokenizer, toolbox, [call, "no", "xyz"], max_tokens=51)
    assert fits.is_truncated
    assert int(fits.mask.sum()) == 21
    _, (context, _) = play(tokenizer, toolbox, [call, "no"], max_model_len=53)
    assert context.is_truncated
    assert context.mask.all()
    _, (edge, _) = play(tokenizer, toolbox, [call, "no", "x"], max_model_len=54)
    assert not edge.is_truncated


def test_prompts_tell_of_tools_where_they_are_rendered(tmp_path, tokenizer, places):
    settings = recipe(tmp_path, prompts={"render": "auto"}, rollout={"tools": places[:1]})
    assert speaks_chat(settings, tokenizer)
    box = make_toolbox(settings)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 2 + 3?"}) + "\n")
    section = settings.prompts.model_copy(update={"path": str(rows), "task": ""})
    (prompt,) = PromptStream(section, tokenizer, None, tools=box.schemas).take(1)
    box.close()
    assert '"name": "add"' in prompt.text
    assert prompt.text.endswith("<|user|>What is 2 + 3?<|end|><|assistant|>")
    plain = recipe(tmp_path, prompts={"render": "plain"}, rollout={"tools": places[:1]})
    assert not speaks_chat(plain, tokenizer)
    assert RolloutSection().tools == ()
    assert make_toolbox(SimpleNamespace(rollout=RolloutSection())) is None


def test_prompts_that_tools_make_too_long_are_skipped_and_counted(tmp_path, tokenizer, places):
    """The first one too: what the template says of the tools counts."""
    settings = recipe(tmp_path, prompts={"render": "auto"}, rollout={"tools": places[:1]})
    box = make_toolbox(settings)
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "x" * 100}, {"prompt": [5, 6, 7]}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = settings.prompts.model_copy(update={"path": str(rows), "task": ""})
    bare = PromptStream(section, tokenizer, None).take(2)
    longest = max(len(prompt.tokens) for prompt in bare)
    asked = that_fit(section, longest + 10, 10)
    assert len(PromptStream(asked, tokenizer, None).take(2)) == 2  # without tools both fit
    stream = PromptStream(asked, tokenizer, None, tools=box.schemas)
    box.close()
    assert [prompt.tokens.tolist() for prompt in stream.take(2)] == [[5, 6, 7]] * 2
    assert stream.num_too_long >= 1
